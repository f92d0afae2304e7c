"""Eight devices give what one gives, whatever the mesh, and whatever mesh a run goes on with."""

import json

import numpy as np
import pytest

import jaxlm
from jaxlm.build import stage
from jaxlm.core import arrays
from jaxlm.train.journal import read_lines

DATA_FSDP_TENSOR = {"data": 2, "fsdp": 2, "tensor": 2}
FSDP_TENSOR = {"data": 1, "fsdp": 2, "tensor": 4}


def losses(workdir) -> dict:
    return {(line["step"], line["split"]): line["loss"] for line in read_lines(workdir / "metrics.jsonl")}


@pytest.fixture
def on(recipe, devices):
    """`on(mesh, workdir, **train)`: runs on a mesh, one device without; the directory."""

    def run(mesh, workdir, **train):
        config = recipe(**train)
        if mesh:
            config.mesh.update(mesh)
        devices(8 if mesh else 1)
        stage.run(config, workdir)
        return workdir

    return run


def test_losses_and_gradients_equal_those_of_one_device(on, tmp_path):
    # Plain gradient descent at rate 1: parameters differ after two steps by what their gradients differ.
    descent = {"optimizer": "sgd", "b1": 0.0, "clip": 0.0, "learning_rate": 1.0, "schedule": "constant", "steps": 2}
    options = descent | {"log_every": 1, "eval_every": 1, "grad_accum": 2}
    one, many = (on(m, tmp_path / name, **options) for m, name in ((None, "one"), (FSDP_TENSOR, "many")))
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)
    before, after = (arrays(jaxlm.load(workdir / "model").params) for workdir in (one, many))
    vocabulary = json.loads((many / "model/config.json").read_text())["vocab_size"]
    assert vocabulary % 4  # so it was padded, and stripped
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_a_run_goes_on_on_another_mesh(on, tmp_path, cut_at):
    whole = on(None, tmp_path / "whole", average_last=2)
    for step, mesh in ((6, None), (10, FSDP_TENSOR)):
        cut_at(step)
        with pytest.raises(ConnectionAbortedError):
            on(mesh, tmp_path / "moved", average_last=2)
    cut_at(None)
    moved = on(DATA_FSDP_TENSOR, tmp_path / "moved", average_last=2)
    assert losses(moved) == pytest.approx(losses(whole), abs=1e-5)
    result, moved_result = (json.loads((d / "result.json").read_text())["metrics"] for d in (whole, moved))
    assert moved_result["eval"] == pytest.approx(result["eval"], rel=1e-5)
