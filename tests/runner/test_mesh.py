"""Eight devices give what one gives, whatever the mesh, and whatever mesh a run goes on with."""

import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.parallel import DEFAULT_MESH
from jaxlm.runner import stage
from jaxlm.runner.config import default_config, mesh_shape, overlay, plain
from jaxlm.runner.run_setup import prepare_run
from jaxlm.runner.trainer import build_trainer
from jaxlm.train.checkpointing import Progress
from jaxlm.train.metric_writer import MetricWriter, read_lines

pytestmark = pytest.mark.slow

FSDP_TENSOR = {"data": 1, "fsdp": 2, "tensor": 4}
FOUR_AXES = {"data": 1, "fsdp": 1, "expert": 2, "tensor": 4}


def losses(workdir) -> dict:
    return {(line["step"], line["split"]): line["loss"] for line in read_lines(workdir / "metrics.jsonl")}


@pytest.fixture
def on(recipe, devices):
    """`on(mesh, workdir, **train)`: runs on a mesh, one device without; the directory. `expert` cuts feed-forwards."""

    def run(mesh, workdir, **train):
        config = recipe(**train)
        if mesh:
            config.mesh_axes = tuple(mesh)
            config.mesh.update(mesh)
            config.sharding.update({"ffn": "expert"} if "expert" in mesh else {})
        devices(8 if mesh else 1)
        stage.run(config, workdir)
        return workdir

    return run


@pytest.mark.full("three axes")
@pytest.mark.parametrize("mesh", [FSDP_TENSOR, FOUR_AXES], ids=["three axes", "four axes"])
def test_losses_and_gradients_equal_those_of_one_device(on, mesh, tmp_path):
    # Plain gradient descent at rate 1: parameters differ after two steps by what their gradients differ.
    descent = {"optimizer": "sgd", "b1": 0.0, "clip": 0.0, "learning_rate": 1.0, "schedule": "constant", "steps": 2}
    options = descent | {"log_every": 1, "eval_every": 1, "grad_accum": 2}
    one, many = (on(m, tmp_path / name, **options) for m, name in ((None, "one"), (mesh, "many")))
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)
    before, after = (arrays(jaxlm.load(workdir / "model").params) for workdir in (one, many))
    vocabulary = json.loads((many / "model/config.json").read_text())["vocab_size"]
    assert vocabulary % 4  # so it was padded, and stripped
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_a_run_goes_on_on_another_mesh(on, tmp_path, cut_at):
    whole = on(None, tmp_path / "whole")
    cut_at(6)
    with pytest.raises(ConnectionAbortedError):
        on(FSDP_TENSOR, tmp_path / "moved")
    cut_at(None)
    moved = on(None, tmp_path / "moved")
    assert losses(moved) == pytest.approx(losses(whole), abs=1e-5)
    result, moved_result = (json.loads((d / "result.json").read_text())["metrics"] for d in (whole, moved))
    assert moved_result["eval"] == pytest.approx(result["eval"], rel=1e-5)


def test_checkpoints_hold_no_padding(on, recipe, tmp_path, devices):
    """A state of eight devices on one device, and of one on eight: array by array the same numbers."""
    devices(8)
    config = recipe()
    config.mesh.update(FSDP_TENSOR)
    inputs = build_trainer(prepare_run(config), tmp_path, MetricWriter(tmp_path, "run"))
    run, state = inputs.run, inputs.state
    table = state.params["embed"]["tokens"]["embedding"]
    assert table.shape[0] % 4 == 0 and run.stores.shapes.params["embed"]["tokens"]["embedding"].shape[0] % 4
    run.stores.save(3, state, Progress(steps=3))
    again, progress = run.stores.resume(state, run.shardings)
    assert progress == Progress(steps=3)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert jax.tree.map(lambda a: a.sharding, again) == jax.tree.map(lambda a: a.sharding, state)
    run.stores.close()


def test_the_order_of_the_axes_is_that_of_the_config(recipe):
    """Not of the keys of a ConfigDict, which are sorted; it survives the way through plain values."""
    config = recipe()
    assert mesh_shape(config) == DEFAULT_MESH and list(mesh_shape(config)) == list(DEFAULT_MESH)
    config.mesh_axes = ("stage", "data", "fsdp", "tensor", "expert")
    config.mesh.update(expert=2, tensor=2)
    expected = {"stage": 1, "data": -1, "fsdp": 1, "tensor": 2, "expert": 2}
    again = default_config()
    overlay(again, json.loads(json.dumps(plain(config))), "config")
    for one in (config, again):
        assert list(mesh_shape(one).items()) == list(expected.items())


def test_mesh_axes_are_checked(recipe):
    config = recipe()
    config.mesh.tensr = 2
    with pytest.raises(ValueError, match="unknown mesh axis 'tensr'; did you mean 'tensor'"):
        prepare_run(config)
    config = recipe()
    config.mesh_axes = ("data", "fsdp", "tensor", "data")
    with pytest.raises(ValueError, match=r"config\.mesh_axes names an axis twice: data, fsdp, tensor, data"):
        mesh_shape(config)


def test_an_axis_that_no_rule_names_is_refused(recipe, devices):
    devices(8)
    config = recipe()
    config.mesh_axes = ("data", "fsdp", "tensor", "expert")
    config.mesh.update(data=4, expert=2)
    with pytest.raises(ValueError, match="'expert' has 2 devices and no sharding rule names it"):
        prepare_run(config)
