"""Configs listed and compiled from shapes alone: surgery, stored models and teachers among them."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.parallel import make_mesh
from jaxlm.runner import registry
from jaxlm.runner.config import default_config
from jaxlm.runner.dry_run import dry_run, lower_step
from jaxlm.tasks import TASKS

SIZES = {"hidden_size": 16, "num_layers": 3, "num_heads": 4, "max_positions": 16}


@pytest.fixture
def recipe():
    config = default_config()
    config.model.update(family="gpt2", **SIZES)
    config.data.update(tokenizer="bpe:300", max_length=16)
    config.train.batch_size = 8
    return config


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def parameters(dry) -> int:
    return sum(a.size for a in arrays(dry.step.params).values())


@pytest.mark.parametrize(
    ("surgery", "heads", "ffn"),
    [
        ({"name": "prune", "heads": 0.5, "ffn": 0.25}, (2, 2, 2), (48, 48, 48)),
        ({"name": "keep_layers", "keep": (0, 2)}, (4, 4), (64, 64)),
        ({"name": "quantize"}, (4, 4, 4), (64, 64, 64)),
    ],
)
def test_surgery_is_done_on_shapes(recipe, mesh, surgery, heads, ffn):
    before = dry_run(recipe, mesh)
    recipe.surgery = (surgery,)
    after = dry_run(recipe, mesh)
    config = after.setup.lm.config
    assert (config.num_heads, config.ffn_size) == (heads, ffn)
    leaves = jax.tree.leaves(after.start.lm.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert (parameters(after) < parameters(before)) == (surgery["name"] != "quantize")


def test_surgery_whose_outcome_depends_on_values_is_refused(recipe, mesh, monkeypatch):
    def changed(lm, context):
        total = np.abs(np.asarray(arrays(lm.params)["embed/tokens/embedding"])).sum()
        return lm.replace(config=lm.config.replace(window=1 + int(total)))

    def reads(lm, context):
        context.calibration(lm)
        raise AssertionError

    monkeypatch.setitem(registry.SURGERY, "changed", changed)
    monkeypatch.setitem(registry.SURGERY, "reads", reads)
    recipe.surgery = ({"name": "changed"},)
    with pytest.raises(ValueError, match=r"config.surgery: changed: what is left depends on the parameters' values"):
        dry_run(recipe, mesh)
    recipe.surgery = ({"name": "reads"},)
    with pytest.raises(
        ValueError, match=r"config.surgery: reads: it reads calibration data.*shapes have no data, so leave it out"
    ):
        dry_run(recipe, mesh)
    recipe.surgery = ({"name": "quantise"},)
    with pytest.raises(ValueError, match="did you mean 'quantize'"):
        dry_run(recipe, mesh)


@pytest.fixture
def stored(tmp_path):
    """A directory with a quantized model, as a stage leaves it."""
    lm = LM.initialize(model_config("gpt2", **SIZES, vocab_size=300), jax.random.key(0))
    jaxlm.save(registry.operate({"name": "quantize"}, lm), tmp_path / "model")
    return str(tmp_path / "model")


def test_a_stored_model_keeps_its_weights_and_a_teacher_its_place(recipe, mesh, stored):
    config = default_config()
    config.model.init = stored
    config.data.max_length, config.train.batch_size = 16, 8
    assert any(a.dtype == np.int8 for a in arrays(dry_run(config, mesh).step.params).values())
    recipe.losses = ({"name": "distill", "teacher": stored, "hidden": 1.0},)
    constants = jax.tree.leaves(dry_run(recipe, mesh).start.constants)
    assert all(isinstance(a, jax.ShapeDtypeStruct) and a.sharding.mesh == mesh for a in constants)
    assert any(a.dtype == np.int8 for a in constants)
    assert "response" in lower_step(recipe, mesh).out_info[1]["terms"]


@pytest.mark.parametrize("task", TASKS)
def test_columns_are_those_that_the_step_reads(task, mesh):
    config = default_config()
    config.task = task
    family = "t5" if task in ("seq2seq", "denoising") else "gpt2" if task == "causal" else "bert"
    config.model.update(family=family, hidden_size=16, num_layers=1, num_heads=4)
    if family != "t5":
        config.model.max_positions = 16
    config.data.update(tokenizer="bpe:300", max_length=16)
    config.train.batch_size = 8
    assert lower_step(config, mesh).out_info is not None
