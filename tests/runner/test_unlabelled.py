"""Texts without labels: only teachers are heard on them, and the labels that there are say what they said before."""

import json

import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.runner import stage
from jaxlm.runner.config import default_config
from jaxlm.runner.run_setup import set_up
from jaxlm.tasks import TASKS
from jaxlm.tasks.task import with_unlabelled

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SENTENCES = {
    "train": ["we saw Anna", "the red bird sings in Rome", "Anna ran", "a dog sat", "we sing", "trees and water"],
    "more": ["Rome saw Anna run up the hill", "a red hill", "water sings", "we ran", "the dog and the bird saw trees"],
    "eval": ["Anna sings", "a bird in Rome"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
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
def recipe(place):
    """`recipe(task, train)`: the config of a run on `train`."""

    def make(task, train="train", **options):
        config = default_config()
        config.task = task
        ending = {"token": "conll", "sequence": "jsonl"}.get(task, "txt")
        config.data.format = ending if ending != "txt" else "text"
        config.data.train, config.data.eval = str(place / f"{train}.{ending}"), str(place / f"eval.{ending}")
        config.data.tokenizer, config.data.max_length, config.data.buckets = "wordpiece:80", 16, 1
        config.model.update(family="bert", hidden_size=16, num_layers=1, num_heads=2, max_positions=16, dropout=0.0)
        config.train.update(steps=4, batch_size=4, learning_rate=0.01, checkpoint_every=0)
        config.data.update(options)
        return config

    return make


@pytest.fixture
def teachers(recipe, place):
    """A model directory for each task, trained on everything; once."""
    for task in ("token", "sequence"):
        stage.run(recipe(task, "all"), place / task)
    return {task: str(place / task / "model") for task in ("token", "sequence")}


def taught(config, teacher, **options):
    config.losses = ({"name": "distill", "teacher": teacher, "alpha": 1.0, "hidden": 1.0, **options},)
    config.data.tokenizer, config.model.init = "", teacher
    config.model.update(dict.fromkeys(("family", "hidden_size", "num_layers", "num_heads", "max_positions", "dropout")))
    config.surgery = ({"name": "prune", "ffn": 0.5},)
    return config


def parameters(directory):
    return {name: np.asarray(a) for name, a in arrays(jaxlm.load(directory / "model").params).items()}


@pytest.mark.parametrize("task", ["token", "sequence"])
def test_who_hears_teachers_only_needs_no_labels(recipe, teachers, place, tmp_path, task):
    """With α = 1 labels say nothing, so texts without them teach what the same texts with them do."""
    texts = str(place / "more.txt")
    stage.run(taught(recipe(task, "all"), teachers[task]), tmp_path / "labelled")
    stage.run(taught(recipe(task, "train", unlabelled=texts), teachers[task]), tmp_path / "without")
    labelled, without = parameters(tmp_path / "labelled"), parameters(tmp_path / "without")
    assert max(np.abs(labelled[name] - without[name]).max() for name in labelled) == 0.0


@pytest.mark.parametrize("task", ["token", "sequence"])
def test_labels_that_there_are_count_as_before(recipe, place, task):
    """The labelled rows are what they are alone; behind them no label counts, and a teacher is heard on every word."""
    alone = set_up(recipe(task, "train")).splits["train"].examples
    both = set_up(recipe(task, "train", unlabelled=str(place / "more.txt"))).splits["train"].examples
    first, rest = (both.take(rows) for rows in np.split(np.arange(len(both)), [len(alone)]))
    for name, column in alone.columns.items():
        assert [row.tolist() for row in first.columns[name]] == [row.tolist() for row in column]
    assert len(rest) == len(SENTENCES["more"])
    assert not any(counted(np.asarray(row)).any() for row in rest.columns["labels"])
    for part, name in ((first, "train"), (rest, "more")):
        heard = sum(np.sum(row) for row in part.columns["scored"])
        assert heard == (sum(len(t.split()) for t in SENTENCES[name]) if task == "token" else len(SENTENCES[name]))


def test_a_cache_has_answers_to_them_too(recipe, teachers, place, tmp_path):
    data = {
        "unlabelled": str(place / "more.jsonl"),
        "unlabelled_format": "jsonl",
        "unlabelled_columns": {"text": "text"},
    }
    live = taught(recipe("sequence", **data), teachers["sequence"], alpha=0.5, hidden=0.0)
    stage.run(live, tmp_path / "live")
    cache = {"directory": str(tmp_path / "cache"), "dtype": "float32"}
    cached = taught(recipe("sequence", **data), teachers["sequence"], alpha=0.5, hidden=0.0, cache=cache)
    (about,) = stage.run(cached, tmp_path / "cached")["teacher_caches"]
    assert about["tokens"] == len(SENTENCES["train"]) + len(SENTENCES["more"])
    one, other = parameters(tmp_path / "live"), parameters(tmp_path / "cached")
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-5


def test_ratings_are_no_numbers_where_there_are_none():
    ids = Ragged.of([[1, 2], [3]])
    rated = Examples({"input_ids": ids, "labels": np.array([0.5, np.nan], np.float32)})
    found = with_unlabelled(rated, Examples({"input_ids": ids, "scored": np.ones(2, np.int32)}))
    assert np.array_equal(found.columns["labels"], np.float32([0.5, np.nan, np.nan, np.nan]), equal_nan=True)
    assert found.columns["scored"].tolist() == [1, 0, 1, 1] and found.lengths.tolist() == [2, 1, 2, 1]


def test_what_cannot_be_is_refused(recipe, teachers, place, tmp_path):
    texts = str(place / "more.txt")
    with pytest.raises(ValueError, match=r"config.data.unlabelled: nobody says anything of texts without labels"):
        stage.run(recipe("sequence", unlabelled=texts), tmp_path / "a")
    with pytest.raises(ValueError, match=r"config.data.unlabelled: the task 'masked' takes no texts without labels"):
        set_up(recipe("masked", unlabelled=texts))
    with pytest.raises(ValueError, match=r"config.data.unlabelled reads .*eval.conll', which may share rows with"):
        set_up(recipe("token", unlabelled=str(place / "eval.conll"), unlabelled_format="conll"))
    pairs = {"text": "text", "text_pair": "note"}
    with pytest.raises(
        ValueError,
        match=r"config.data.unlabelled: these texts have a column text_pair, the training data have none",
    ):
        set_up(
            recipe(
                "sequence",
                unlabelled=texts.replace("txt", "jsonl"),
                unlabelled_format="jsonl",
                unlabelled_columns=pairs,
            )
        )
    wrong = {"unlabelled": texts.replace("txt", "jsonl"), "unlabelled_format": "jsonl"}
    with pytest.raises(ValueError, match=r"no column 'text', .* rename with config.data.unlabelled_columns"):
        set_up(recipe("sequence", **wrong, unlabelled_columns={"tokens": "note"}))
    assert TASKS["causal"].unlabelled is None


def test_weights_are_one_where_there_are_none():
    ids, heard = Ragged.of([[1, 2], [3]]), {"scored": np.ones(2, np.int32)}
    weighed = Examples({"input_ids": ids, "labels": np.int32([0, 1]), "weight": np.float32([2, 3])})
    assert with_unlabelled(weighed, Examples({"input_ids": ids, **heard})).columns["weight"].tolist() == [2, 3, 1, 1]
