"""A row that a task cannot use is bad for every task in one way: file, line and reason, and left out with "skip"."""

import json
import re

import numpy as np
import pytest

from jaxlm.data import BadRowError
from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.tasks import TASKS

GOOD = {
    "causal": {"text": "ab b"},
    "masked": {"text": "ab b"},
    "next_sentence": {"text": "ab. b. a. b."},
    "denoising": {"text": "ab b"},
    "seq2seq": {"source": "ab", "target": "b"},
    "sequence": {"text": "ab", "label": "y"},
    "regression": {"text": "ab", "label": 0.5},
    "token": {"tokens": ["a", "b"], "tags": ["B-X", "O"]},
}
TEXTS = [(None, "None is NoneType, not a string"), (5, "5 is int"), (["a"], "is list"), ("", "blank"), (" \n", "blank")]
BAD = [
    *[(task, {"text": text}, f"text .*{reason}") for task in ("causal", "next_sentence") for text, reason in TEXTS],
    *[(task, {"text": ""}, "the text is blank") for task in ("masked", "denoising", "sequence", "regression")],
    *[("sequence", {"text": text}, f"text .*{reason}") for text, reason in TEXTS],
    *[("seq2seq", {name: text}, f"{name} .*{reason}") for name in ("source", "target") for text, reason in TEXTS],
    *[("sequence", {"label": value}, "not the name of a class") for value in (None, float("nan"), ["y"], {}, 1e999)],
    ("sequence", {"label": " "}, "the label is blank"),
    ("sequence", {"text_pair": "b"}, "a column 'text_pair', which the rows before do not have"),
    *[("regression", {"label": value}, "label .* is not a number") for value in (None, "", "3,5", "1_0", True, [1])],
    *[("regression", {"label": value}, "label .* is not a number") for value in ("nan", "inf", 1e300, 10**400)],
    ("token", {"tags": ["O"]}, "2 tokens, but 1 tags"),
    ("token", {"tags": ["O", "O", "O"]}, "2 tokens, but 3 tags"),
    ("token", {"tags": [0, 1]}, r"tags that are numbers: set config\.data\.labels to their names in order"),
    ("token", {"tags": [1.0, "O"]}, "tags that are numbers"),
    ("token", {"tags": ["O", None]}, "the tag None is NoneType"),
    ("token", {"tags": ["O", ""]}, "the tag is blank"),
    ("token", {"tags": "OO"}, "the tags 'OO' are str, not a list"),
    ("token", {"tokens": "ab"}, "the tokens 'ab' are str, not a list"),
    ("token", {"tokens": ["a", 5]}, "the token 5 is int, not a string"),
    ("token", {"tokens": [], "tags": []}, "the tokens are blank"),
    ("token", {"tokens": None}, "the tokens None are NoneType"),
    *[(task, {"weight": 1.0}, "a column 'weight', which") for task in ("sequence", "regression", "seq2seq", "token")],
]


def write(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(format="jsonl", train=str(path), **settings)


@pytest.fixture(scope="module")
def tokenizers():
    texts = ["ab a b. ab. "]
    return {"": load_tokenizer("character", texts), "wordpiece": load_tokenizer("wordpiece:80", texts)}


@pytest.fixture
def prepare(tokenizers):
    def prepare(task, settings, labels=None):
        tokenizer = tokenizers["wordpiece" if task in ("masked", "next_sentence") else ""]
        labels = labels or settings.labels or TASKS[task].labels(settings.source("train"))
        source = settings.source("train")
        return TASKS[task].prepare(source, tokenizer, labels, settings), source

    return prepare


@pytest.mark.parametrize(("task", "change", "reason"), BAD)
def test_unusable_rows(tmp_path, prepare, task, change, reason):
    rows = [GOOD[task], GOOD[task] | change, GOOD[task]]
    with pytest.raises(BadRowError, match=rf"rows\.jsonl:2: .*{reason}.* bad_rows='skip'"):
        prepare(task, write(tmp_path / "rows.jsonl", rows))
    prepared, source = prepare(task, write(tmp_path / "rows.jsonl", rows, bad_rows="skip"))
    assert [bad.line for bad in source.bad] == [2] and source.rows == 2
    assert re.search(reason, source.bad[0].reason)
    without, _ = prepare(task, write(tmp_path / "rows.jsonl", [GOOD[task]] * 2))
    assert len(prepared.examples) == len(without.examples)
    np.testing.assert_array_equal(prepared.examples.lengths, without.examples.lengths)


@pytest.mark.parametrize("task", GOOD)
def test_missing_columns(tmp_path, prepare, task):
    name = next(iter(GOOD[task]))
    rows = [GOOD[task], {"id": 7, "other": "x"}]
    reason = rf"no column '{name}', only 'id', 'other'; rename with config\.data\.columns = {{'{name}': \.\.\.}}"
    with pytest.raises(BadRowError, match=rf"rows\.jsonl:2: {reason}"):
        prepare(task, write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=rf"no usable row: all 2 are bad, the first at .*rows\.jsonl:1: {reason}"):
        prepare(task, write(tmp_path / "rows.jsonl", rows[1:] * 2, bad_rows="skip"))


@pytest.mark.parametrize("bad", ["heavy", "-1", "nan", "inf", "", " ", None, True])
@pytest.mark.parametrize("task", ["sequence", "regression", "seq2seq", "token"])
def test_weights(tmp_path, prepare, task, bad):
    rows = [GOOD[task] | {"weight": weight} for weight in ("1.5", bad, 0)]
    prepared, source = prepare(task, write(tmp_path / "rows.jsonl", rows, bad_rows="skip"))
    np.testing.assert_array_equal(prepared.examples.columns["weight"], np.float32([1.5, 0.0]))
    assert [bad.line for bad in source.bad] == [2] and source.bad[0].reason.startswith("weight ")
    reason = "no column 'weight', which the rows before have"
    _, source = prepare(task, write(tmp_path / "rows.jsonl", [rows[0], GOOD[task]], bad_rows="skip"))
    assert [bad.reason for bad in source.bad] == [reason]


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_texts_without_labels(tmp_path, tokenizers, task):
    rows = [{"text": "ab"}, {"text": None}, {"text": " "}, {"label": "x"}, {"text": "ab", "weight": 1}]
    settings = write(tmp_path / "rows.jsonl", rows, bad_rows="skip")
    source = settings.source("train")
    assert len(TASKS[task].unlabelled(source, tokenizers[""], settings)) == 1
    assert [bad.line for bad in source.bad] == [2, 3, 4, 5]


def test_classes_of_bad_rows_are_none(tmp_path):
    rows = [GOOD["sequence"], {"text": None, "label": "lost"}]
    assert TASKS["sequence"].labels(write(tmp_path / "a", rows, bad_rows="skip").source("train")) == ("y",)
    rows = [GOOD["token"], {"tokens": ["a"], "tags": ["B-LOST", "O"]}]
    assert TASKS["token"].labels(write(tmp_path / "a", rows, bad_rows="skip").source("train")) == ("B-X", "O")


def test_names_of_classes(tmp_path, prepare):
    """Numbers are names, in their order; pandas writes 1 as 1.0 where it misses one."""
    values = [10, 2.0, "1", 2, 0.5, True]
    settings = write(tmp_path / "a", [{"text": "a", "label": value} for value in values])
    assert TASKS["sequence"].labels(settings.source("train")) == ("0.5", "1", "10", "2", "True")
    settings = write(tmp_path / "a", [{"text": "a", "label": value} for value in values[:4]])
    prepared, _ = prepare("sequence", settings)
    assert TASKS["sequence"].labels(settings.source("train")) == ("1", "2", "10")
    assert prepared.examples.columns["labels"].tolist() == [2, 1, 0, 1]


def test_numbers_that_stand_for_names(tmp_path, prepare):
    names, values = ("neg", "7", "pos"), [0, "2", 7, "neg", 2.0]
    settings = write(tmp_path / "a", [{"text": "a", "label": value} for value in [*values, 3]], labels=names)
    with pytest.raises(BadRowError, match=r"a:6: the label 3 is beyond the 3 names of config\.data\.labels"):
        prepare("sequence", settings)
    settings = write(tmp_path / "a", [{"text": "a", "label": value} for value in values], labels=names)
    prepared, _ = prepare("sequence", settings, ("pos", "neg", "7"))  # a model has its own order
    assert prepared.examples.columns["labels"].tolist() == [1, 0, 2, 1, 0]
    rows = [{"tokens": ["a", "b"], "tags": [1, 0]}, {"tokens": ["a", "b"], "tags": [2, -1]}]
    settings = write(tmp_path / "b", rows, labels=("O", "B-X", "I-X"), bad_rows="skip")
    prepared, source = prepare("token", settings, ("B-X", "I-X", "O"))
    labels = prepared.examples.columns["labels"].values
    assert labels[labels >= 0].tolist() == [0, 2]
    assert [bad.reason for bad in source.bad] == ["the tag -1 is beyond the 3 names of config.data.labels"]


def test_classes_that_a_model_does_not_have(tmp_path, prepare):
    settings = write(tmp_path / "a", [GOOD["sequence"], {"text": "a", "label": 1}], bad_rows="skip")
    _, source = prepare("sequence", settings, ("x", "y"))
    assert [bad.reason for bad in source.bad] == [
        "label '1' is not among the classes (x, y); where numbers stand for names, set config.data.labels to these in "
        "order"
    ]
    settings = write(tmp_path / "a", [GOOD["token"], {"tokens": ["a"], "tags": ["B-Y"]}], bad_rows="skip")
    _, source = prepare("token", settings, ("B-X", "O"))
    assert [bad.reason for bad in source.bad] == ["tag 'B-Y' is not among the classes (B-X, O)"]


def test_unlikely_classes_are_noticed(tmp_path, prepare):
    rows = [GOOD["sequence"]] * 2
    notices = lambda rows, task="sequence": prepare(task, write(tmp_path / "a", rows))[0].notices  # noqa: E731
    assert notices(rows) == () and notices([*rows, {"text": "a", "label": "z"}]) == ()
    assert notices([*rows, {"text": "a", "label": "Sentiment"}]) == (
        "the class 'Sentiment' occurs once, and reads like a header: is a line with the names of columns read as a "
        "row?",
    )
    assert notices([{"text": "text", "label": "label"}] * 2) == ()
    assert notices([{"text": "a", "label": "z"}, *rows * 500]) == (
        "the class 'z' occurs once among 1001 rows: is it misspelt, or not a class?",
    )
    assert notices([{"text": "a", "label": "z"}, *rows * 499]) == ()
    header = {"tokens": ["tokens"], "tags": ["tags"]}
    assert (
        "'tags' occurs once, and reads like a header" in notices([{"tokens": ["a"], "tags": ["X"]}, header], "token")[0]
    )
