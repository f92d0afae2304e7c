"""The end of a run: the model before its scores, averages of what was baked, finished directories over other data."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.runner import stage

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.slow]


@pytest.fixture
def copied_corpus(recipe, corpus, tmp_path):
    """A recipe over copies of the texts, which a test may change."""
    shutil.copytree(corpus, tmp_path / "texts")
    config = recipe(steps=0)
    config.data.update(train=str(tmp_path / "texts/train.txt"), eval=str(tmp_path / "texts/eval.txt"))
    return config


def test_a_finished_run_over_changed_data_is_not_answered(copied_corpus, tmp_path):
    result = stage.run(copied_corpus, tmp_path / "run")
    file = tmp_path / "texts/eval.txt"
    os.utime(file, (0, 0))  # written anew, with the same bytes
    assert stage.run(copied_corpus, tmp_path / "run") == result
    file.write_text(file.read_text().replace("cat", "dog"))
    with pytest.raises(
        ValueError, match=r"data that have changed since:\n  config.data.eval: .*texts/eval.txt\nchoose"
    ):
        stage.run(copied_corpus, tmp_path / "run")


def test_the_model_is_saved_before_it_is_measured(copied_corpus, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no room for scores")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "measure", fail)
        with pytest.raises(MemoryError):
            stage.run(copied_corpus, tmp_path / "run")
    saved = stage.params_sha256(jaxlm.load(tmp_path / "run/model").params)
    assert stage.run(copied_corpus, tmp_path / "run")["params_sha256"] == saved


def test_what_cannot_be_scored_is_not_measured(copied_corpus, tmp_path):
    """One word of one piece and no begin token: there is nothing to predict, and no perplexity of 1.0."""
    tokenizer = tmp_path / "tokenizer"
    stage.run(copied_corpus, tmp_path / "first")
    without_ends = jaxlm.load(tmp_path / "first/model").tokenizer
    without_ends.bos_token = without_ends.eos_token = None
    without_ends.save_pretrained(tokenizer)
    (tmp_path / "texts/eval.txt").write_text("a\nb\n")
    copied_corpus.data.tokenizer = str(tokenizer)
    result = stage.run(copied_corpus, tmp_path / "second")
    assert set(result["metrics"]["eval"].values()) == {None}
    assert json.loads((tmp_path / "second/result.json").read_text(), parse_constant=pytest.fail) == result


def averaged(config, workdir, monkeypatch):
    """A run that averages its last checkpoints, and what each of them is by itself, baked."""
    models = []
    baked = stage.baked
    monkeypatch.setattr(stage, "baked", lambda *args: models.append(baked(*args)) or models[-1])
    stage.run(config, workdir)
    return jaxlm.load(workdir / "model"), models


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "rank": 2, "alpha": 64.0},
        {"name": "magnitude", "sparsity": 0.6, "begin": 0, "end": 12, "every": 2},  # masks differ in the window
    ],
)
def test_an_average_is_of_baked_checkpoints(method, recipe, tmp_path, monkeypatch):
    config = recipe(average_last=2, learning_rate=0.02, schedule="constant")
    config.methods = (method,)
    lm, models = averaged(config, tmp_path, monkeypatch)
    assert len(models) == 2
    first, second = (arrays(model.params) for model in models)
    mean = arrays(lm.params)
    for name, array in mean.items():
        assert np.allclose(array, (first[name] + second[name]) / 2, rtol=0, atol=1e-6), name
    assert any(not np.array_equal(first[name], second[name]) for name in mean)


@pytest.mark.full
def test_what_bakes_to_codes_is_averaged_before(recipe, tmp_path, monkeypatch):
    config = recipe(average_last=2, learning_rate=0.02, schedule="constant")
    config.methods = ({"name": "qat"},)
    lm, models = averaged(config, tmp_path, monkeypatch)
    assert len(models) == 3 and any(array.dtype == jnp.int8 for array in arrays(lm.params).values())
    assert stage.params_sha256(lm.params) == stage.params_sha256(models[-1].params)


def test_widths_that_changed_have_no_average(recipe, tmp_path, monkeypatch, capsys):
    config = recipe(average_last=2)
    config.methods = ({"name": "structured", "ffn": 0.5, "begin": 0, "end": 12, "every": 4},)
    lm, models = averaged(config, tmp_path, monkeypatch)
    assert stage.params_sha256(lm.params) == stage.params_sha256(models[-1].params)
    assert lm.config.ffn_size == models[-1].config.ffn_size


def test_unbaked_averages_are_refused_before_training(recipe, tmp_path):
    config = recipe(average_last=2)
    config.update(methods=({"name": "lora"},), bake=False)
    with pytest.raises(ValueError, match=r"config.train.average_last = 2: what is averaged are baked models"):
        stage.run(config, tmp_path)


def test_bfloat16_without_instructions_for_it_is_said(copied_corpus, tmp_path, monkeypatch, capsys):
    copied_corpus.train.update(steps=1, dtype="bfloat16")
    monkeypatch.setattr(stage, "fast_bfloat16", lambda: False)
    monkeypatch.setattr(stage, "build_trainer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.run(copied_corpus, tmp_path / "run")
    assert "float32 is faster here" in capsys.readouterr().err


def test_a_stage_carries_what_its_model_says(copied_corpus, tmp_path):
    """Pruned, with the end tokens, the chat template and the length that the directory named."""
    copied_corpus.model.update(family="llama", max_positions=None, dropout=None, ffn_size=48)
    stage.run(copied_corpus, tmp_path / "first")
    model = tmp_path / "first/model"
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": [0, 3], "max_position_embeddings": 77}
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3], "temperature": 0.5}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    copied_corpus.model.update({name: None for name in copied_corpus.model if name != "init"} | {"init": str(model)})
    copied_corpus.data.tokenizer = ""
    copied_corpus.surgery = ({"name": "prune", "ffn": 0.5},)
    stage.run(copied_corpus, tmp_path / "second")
    written = tmp_path / "second/model"
    config = json.loads((written / "config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"], config["pad_token_id"]) == ([0, 3], 77, 1)
    assert json.loads((written / "generation_config.json").read_text()) == {"eos_token_id": [0, 3], "temperature": 0.5}
    assert (written / "chat_template.jinja").read_text() == "{{ messages }}"
    lm = jaxlm.load(written)
    assert lm.end_ids == (0, 3) and set(lm.config.ffn_size) == {24}
    assert jax.tree.leaves(lm.params)
