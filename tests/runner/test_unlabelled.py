"""Unlabelled data for distillation: a teacher's predictions are learned there, and labelled rows are what they were."""

import json

import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.runner import stage
from jaxlm.runner.config import default_config
from jaxlm.runner.run_setup import prepare_run
from jaxlm.tasks import TASKS
from jaxlm.tasks.task import with_unlabelled

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.slow]
SENTENCES = {
    "train": ["we saw Anna", "the red bird sings in Rome", "Anna ran", "a dog sat", "we sing", "trees and water"],
    "more": ["Rome saw Anna run up the hill", "a red hill", "water sings", "we ran", "the dog and the bird saw trees"],
    "eval": ["Anna sings", "a bird in Rome"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sentences with tags, with classes and without either; `all` are those to learn from and those without labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for name, sentences in {**SENTENCES, "all": SENTENCES["train"] + SENTENCES["more"]}.items():
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in sentences))
        rows = [{"text": text, "label": "ab"["Anna" in text], "note": "x"} for text in sentences]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tagged = ["".join(f"{word} {'BO'[word.islower()]}\n" for word in text.split()) for text in sentences]
        (folder / f"{name}.conll").write_text("\n".join(tagged))
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    """`recipe(task, train)`: the config of a run on `train`."""

    def make(task, train="train", **options):
        config = default_config()
        config.task = task
        ending = {"token": "conll", "sequence": "jsonl"}.get(task, "txt")
        config.data.format = ending if ending != "txt" else "text"
        config.data.train, config.data.eval = str(folder / f"{train}.{ending}"), str(folder / f"eval.{ending}")
        config.data.tokenizer, config.data.max_length, config.data.buckets = "wordpiece:80", 16, 1
        config.model.update(family="bert", hidden_size=16, num_layers=1, num_heads=2, max_positions=16, dropout=0.0)
        config.train.update(steps=4, batch_size=4, learning_rate=0.01, checkpoint_every=0)
        config.data.update(options)
        return config

    return make


@pytest.fixture
def teachers(recipe, folder):
    """A model directory for each task, trained on everything; once."""
    for task in ("token", "sequence"):
        stage.run(recipe(task, "all"), folder / task)
    return {task: str(folder / task / "model") for task in ("token", "sequence")}


def student(config, teacher, **options):
    config.losses = ({"name": "distill", "teacher": teacher, "alpha": 1.0, "hidden": 1.0, **options},)
    config.data.tokenizer, config.model.init = "", teacher
    config.model.update(dict.fromkeys(("family", "hidden_size", "num_layers", "num_heads", "max_positions", "dropout")))
    config.surgery = ({"name": "prune", "ffn": 0.5},)
    return config


def parameters(directory):
    return {name: np.asarray(a) for name, a in arrays(jaxlm.load(directory / "model").params).items()}


@pytest.mark.full("sequence")
@pytest.mark.parametrize("task", ["token", "sequence"])
def test_distillation_alone_needs_no_labels(recipe, teachers, folder, tmp_path, task):
    """With α = 1 labels do not count, so unlabelled data teach what the same data with labels do."""
    texts = str(folder / "more.txt")
    stage.run(student(recipe(task, "all"), teachers[task]), tmp_path / "labelled")
    stage.run(student(recipe(task, "train", unlabelled=texts), teachers[task]), tmp_path / "without")
    labelled, without = parameters(tmp_path / "labelled"), parameters(tmp_path / "without")
    assert max(np.abs(labelled[name] - without[name]).max() for name in labelled) == 0.0


@pytest.mark.parametrize("task", ["token", "sequence"])
def test_labelled_rows_stay_as_they_are(recipe, folder, task):
    """The labelled rows are what they are alone; in those behind them no label counts, and every word is distilled."""
    alone = prepare_run(recipe(task, "train")).splits["train"].examples
    both = prepare_run(recipe(task, "train", unlabelled=str(folder / "more.txt"))).splits["train"].examples
    rows = {name: [np.asarray(row).tolist() for row in column] for name, column in both.columns.items()}
    first, rest = (
        {name: column[part] for name, column in rows.items()} for part in (slice(len(alone)), slice(len(alone), None))
    )
    for name, column in alone.columns.items():
        assert first[name] == [row.tolist() for row in column]
    assert len(rest["labels"]) == len(SENTENCES["more"])
    assert not any(counted(np.asarray(row)).any() for row in rest["labels"])
    for part, name in ((first, "train"), (rest, "more")):
        distilled = sum(np.sum(row) for row in part["distill_mask"])
        assert distilled == (sum(len(t.split()) for t in SENTENCES[name]) if task == "token" else len(SENTENCES[name]))


def test_a_cache_has_answers_to_them_too(recipe, teachers, folder, tmp_path):
    data = {
        "unlabelled": str(folder / "more.jsonl"),
        "unlabelled_format": "jsonl",
        "unlabelled_columns": {"text": "text"},
    }
    live = student(recipe("sequence", **data), teachers["sequence"], alpha=0.5, hidden=0.0)
    stage.run(live, tmp_path / "live")
    cache = {"directory": str(tmp_path / "cache"), "dtype": "float32"}
    cached = student(recipe("sequence", **data), teachers["sequence"], alpha=0.5, hidden=0.0, cache=cache)
    (about,) = stage.run(cached, tmp_path / "cached")["teacher_caches"]
    assert about["tokens"] == len(SENTENCES["train"]) + len(SENTENCES["more"])
    one, other = parameters(tmp_path / "live"), parameters(tmp_path / "cached")
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-5


def test_ratings_are_no_numbers_where_there_are_none():
    ids = Ragged.of([[1, 2], [3]])
    rated = Examples({"input_ids": ids, "labels": np.array([0.5, np.nan], np.float32)})
    joined = with_unlabelled(rated, Examples({"input_ids": ids, "distill_mask": np.ones(2, np.int32)}))
    assert np.array_equal(joined.columns["labels"], np.float32([0.5, np.nan, np.nan, np.nan]), equal_nan=True)
    assert joined.columns["distill_mask"].tolist() == [1, 0, 1, 1] and joined.lengths.tolist() == [2, 1, 2, 1]


def test_what_cannot_be_is_refused(recipe, teachers, folder, tmp_path):
    texts = str(folder / "more.txt")
    with pytest.raises(
        ValueError,
        match=r"config.data.unlabelled: unlabelled data are for distillation, and no entry of config.losses has",
    ):
        stage.run(recipe("sequence", unlabelled=texts), tmp_path / "a")
    with pytest.raises(ValueError, match=r"config.data.unlabelled: the task 'masked' takes no unlabelled data"):
        prepare_run(recipe("masked", unlabelled=texts))
    with pytest.raises(ValueError, match=r"config.data.unlabelled reads .*eval.conll', which may share rows with"):
        prepare_run(recipe("token", unlabelled=str(folder / "eval.conll"), unlabelled_format="conll"))
    pairs = {"text": "text", "text_pair": "note"}
    with pytest.raises(
        ValueError,
        match=r"config.data.unlabelled: these texts have a column text_pair, the training data have none",
    ):
        prepare_run(
            recipe(
                "sequence",
                unlabelled=texts.replace("txt", "jsonl"),
                unlabelled_format="jsonl",
                unlabelled_columns=pairs,
            )
        )
    wrong = {"unlabelled": texts.replace("txt", "jsonl"), "unlabelled_format": "jsonl"}
    with pytest.raises(ValueError, match=r"no column 'text', .* rename with config.data.unlabelled_columns"):
        prepare_run(recipe("sequence", **wrong, unlabelled_columns={"tokens": "note"}))
    assert TASKS["causal"].unlabelled is None


def test_weights_are_one_where_there_are_none():
    ids, distill_mask = Ragged.of([[1, 2], [3]]), {"distill_mask": np.ones(2, np.int32)}
    weighed = Examples({"input_ids": ids, "labels": np.int32([0, 1]), "weight": np.float32([2, 3])})
    assert with_unlabelled(weighed, Examples({"input_ids": ids, **distill_mask})).columns["weight"].tolist() == [
        2,
        3,
        1,
        1,
    ]
