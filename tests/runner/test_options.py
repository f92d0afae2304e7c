"""What config.train offers, in a few runs that combine it: it trains, and what was frozen stays as it was."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays, flatten
from jaxlm.runner import stage
from jaxlm.runner.run_setup import apply_surgery, prepare_run
from jaxlm.runner.trainer import build_trainer
from jaxlm.train.metric_writer import MetricWriter

pytestmark = pytest.mark.slow

LAYERS = ((r"layers_1/.*", 0.5), (r"embed/.*", 0.0))
COMBINATIONS = {
    "adafactor": {"dtype": "bfloat16", "remat": "dots", "schedule": "cosine", "learning_rates": LAYERS},
    "lion": {"remat": "full", "schedule": "inverse_sqrt", "warmup": 2.0, "trainable": ((r"layers_0/.*", False),)},
    "sgd": {"schedule": "constant", "weight_decay": 0.1, "decay": ((r".*bias", True), (r".*", False)), "clip": 0.0},
    "adamw": {"warmup": 0.2, "final_learning_rate": 0.1, "weight_decay": 0.1, "epochs": 2.0, "steps": 0},
}
FROZEN = {"adafactor": "embed/", "lion": "layers_0/", "sgd": "none", "adamw": "none"}


@pytest.mark.full
@pytest.mark.parametrize("optimizer", COMBINATIONS)
def test_optimizers_and_their_company(optimizer, recipe, tmp_path):
    config = recipe(optimizer=optimizer, learning_rate=1e-2, **COMBINATIONS[optimizer])
    before = flatten(prepare_run(config, splits=()).lm.params)
    result = stage.run(config, tmp_path)
    after = arrays(jaxlm.load(tmp_path / "model").params)
    assert np.isfinite(result["metrics"]["train"]["loss"]) and result["skipped_updates"] == 0
    assert result["metrics"]["train"]["loss"] < 3.2  # log 24, the characters, where it began
    for path, array in before.items():
        assert after[path].dtype == np.float32
        moved = not np.array_equal(array, after[path])
        # Keys' biases have no gradient: a softmax does not see what is added to all scores of a row.
        assert moved == (not path.startswith(FROZEN[optimizer])) or path.endswith("key/bias"), path


def test_epochs_are_passes(recipe, tmp_path):
    config = recipe(steps=0, epochs=1.5)
    setup = prepare_run(config)
    batches = setup.task.batches(setup.splits["train"], setup.lm.tokenizer, setup.data, 8, 0)
    run = build_trainer(setup, tmp_path, MetricWriter(tmp_path, "run")).run
    assert run.steps == -(-3 * batches.steps_per_epoch // 2)


def test_teachers_are_no_part_of_a_checkpoint(recipe, tmp_path):
    config = recipe(steps=4)
    stage.run(config, tmp_path / "teacher")
    config.losses = ({"name": "distill", "teacher": str(tmp_path / "teacher/model"), "alpha": 0.5},)
    run, state, *_ = build_trainer(apply_surgery(prepare_run(config)), tmp_path, MetricWriter(tmp_path, "run"))
    teacher, student = (sum(a.size for a in jax.tree.leaves(t)) for t in (run.constants, state.params))
    assert teacher == student
    assert sum(a.size for a in jax.tree.leaves(run.stores.shapes)) < 3.1 * student  # parameters and two moments
