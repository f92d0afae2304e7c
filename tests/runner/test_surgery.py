"""Surgery in a stage: a pruned or trimmed model is one like any other, whatever comes after."""

from pathlib import Path

import numpy as np
import pytest

import jaxlm
from jaxlm.core import flatten
from jaxlm.io.model_directory import PADDED, open_model, write_model
from jaxlm.runner import registry, stage
from jaxlm.runner.run_setup import apply_surgery, prepare_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense():
    """The trained model, once there is one."""
    return {}


def trained(recipe, dense, tmp_path_factory):
    """A model of pieces of bytes, trained for a moment on all text: `(config, its directory)`."""
    if not dense:
        config = recipe(steps=2)
        config.data.tokenizer = "bpe:330"
        directory = tmp_path_factory.mktemp("dense")
        stage.run(config, directory)
        dense["run"] = config, directory / "model"
    config, model = dense["run"]
    config = config.copy_and_resolve_references()
    config.data.tokenizer = ""
    config.model.update(init=str(model), **dict.fromkeys(("family", "hidden_size", "num_layers", "num_heads")))
    config.model.update(max_positions=None, dropout=None)
    return config, model


@pytest.mark.full
def test_prune_train_prune_again_and_convert(recipe, dense, tmp_path_factory, tmp_path):
    config, _ = trained(recipe, dense, tmp_path_factory)
    config.surgery = ({"name": "prune", "ffn": 0.25, "hidden": 0.25, "budget": "global", "multiple": 4},)
    first = stage.run(config, tmp_path / "first")
    assert np.isfinite(first["metrics"]["eval"]["loss"]) and first["steps"] == 2
    config.model.init = str(tmp_path / "first/model")
    config.surgery = ({"name": "prune", "heads": 0.5, "ffn": 0.25}, {"name": "keep_layers", "keep": (1,)})
    stage.run(config, tmp_path / "second")
    lm = jaxlm.load(tmp_path / "second/model")
    assert lm.config.hidden_size == 24 and lm.config.num_layers == 1 and lm.config.num_heads == (1,)
    assert lm.config.ffn_size[0] < 96
    write_model(tmp_path / "copy", open_model(tmp_path / "second/model"), native=True, padded=True)
    ids = {"input_ids": np.arange(10)[None]}
    for directory in (tmp_path / "copy", tmp_path / "copy" / PADDED):
        again = jaxlm.load(directory)
        assert np.allclose(again.apply(again.params, ids)["logits"], lm.apply(lm.params, ids)["logits"], atol=1e-5)


def test_a_trimmed_vocabulary_is_the_stage_s_own(recipe, dense, tmp_path_factory, tmp_path):
    config, _ = trained(recipe, dense, tmp_path_factory)
    lines = Path(config.data.train).read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join(line.replace("birds", "cats") for line in lines[:20]))
    config.data.train = str(tmp_path / "few.txt")
    config.surgery = ({"name": "trim_vocabulary"}, {"name": "prune", "ffn": 0.5})
    before = prepare_run(config)
    after = apply_surgery(before)
    assert len(after.lm.tokenizer) == after.lm.config.vocab_size < len(before.lm.tokenizer)
    rows = [(s.lm.tokenizer, s.splits["train"].examples.columns["input_ids"]) for s in (before, after)]
    old, new = ([t.convert_ids_to_tokens(row.tolist()) for row in ids] for t, ids in rows)
    assert old == new
    result = stage.run(config, tmp_path / "run")
    lm = jaxlm.load(tmp_path / "run/model")
    assert len(lm.tokenizer) == lm.config.vocab_size == after.lm.config.vocab_size and result["steps"] == 2
    assert flatten(lm.params)["embed/tokens/embedding"].shape[0] == len(lm.tokenizer)


def test_scores_from_data_read_calibration_and_others_do_not(recipe, dense, tmp_path_factory):
    config, _ = trained(recipe, dense, tmp_path_factory)
    config.calibration.update(samples=4, batch_size=2, length=16)
    config.surgery = ({"name": "prune", "ffn": 0.5},)
    assert apply_surgery(prepare_run(config)).calibration is None
    config.surgery = (
        {"name": "trim_vocabulary"},
        {"name": "prune", "heads": 0.5, "ffn": 0.5, "score": "taylor", "budget": "global"},
        {"name": "drop_layers", "share": 0.5},
    )
    setup = apply_surgery(prepare_run(config))
    assert setup.calibration["samples"] == 4 and setup.lm.config.num_layers == 1
    assert setup.lm.config.vocab_size == len(setup.lm.tokenizer)


def test_a_surgery_reads_what_its_context_gives(recipe, dense, tmp_path_factory, monkeypatch):
    config, _ = trained(recipe, dense, tmp_path_factory)
    seen = {}

    def look(lm, context, *, depth=1):
        seen.update(loss=context.loss(), text=next(iter(context.texts("train"))))
        return lm

    monkeypatch.setitem(registry.SURGERY, "look", look)
    config.surgery = ({"name": "look"},)
    before = prepare_run(config)
    after = apply_surgery(before)
    assert seen["loss"] is before.task.loss and seen["text"].endswith(".")
    assert after.lm.tokenizer is before.lm.tokenizer and after.splits is before.splits
    config.surgery = ({"name": "look", "loss": 3},)
    with pytest.raises(ValueError, match="look has no option 'loss'"):
        apply_surgery(prepare_run(config))
