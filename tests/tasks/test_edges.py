"""Ends of sequences and labels that are no numbers."""

import json

import numpy as np
import pytest

from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.tasks import TASKS


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_targets_end_with_the_end_token_though_the_tokenizer_adds_none(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [{"source": "abc", "target": "cba"}, {"source": "ab", "target": "b" * 40}])
    settings = DataSettings(format="jsonl", train=str(file), max_length=8)
    tokenizer = load_tokenizer("character", ["abc"])
    columns = TASKS["seq2seq"].prepare(settings.source("train"), tokenizer, (), settings).examples.columns
    for name in ("input_ids", "labels"):
        assert [row[-1] for row in columns[name]] == [tokenizer.eos_token_id] * 2
        assert columns[name].lengths.max() <= settings.max_length
    for shifted, labels in zip(columns["decoder_input_ids"], columns["labels"], strict=True):
        np.testing.assert_array_equal(shifted, [tokenizer.pad_token_id, *labels[:-1]])


@pytest.mark.parametrize("label", ["nan", "inf", None, "three"])
def test_a_rating_that_is_no_number_is_a_bad_row(tmp_path, label):
    file = write(tmp_path / "rated.jsonl", [{"text": "a", "label": 1.5}, {"text": "b", "label": label}])
    settings = DataSettings(format="jsonl", train=str(file), bad_rows="skip")
    source = settings.source("train")
    prepared = TASKS["regression"].prepare(source, load_tokenizer("character", ["ab"]), (), settings)
    np.testing.assert_array_equal(prepared.examples.columns["labels"], np.float32([1.5]))
    assert [bad.line for bad in source.bad] == [2] and "is not a number" in source.bad[0].reason


@pytest.mark.parametrize("task", ["causal", "denoising", "masked"])
def test_a_text_that_is_no_string_is_a_bad_row(tmp_path, task):
    file = write(tmp_path / "texts.jsonl", [{"text": "ab"}, {"text": None}, {"text": ""}, {"text": "b"}])
    tokenizer = load_tokenizer("wordpiece:80" if task == "masked" else "character", ["ab"])
    settings = DataSettings(format="jsonl", train=str(file))
    with pytest.raises(ValueError, match=r"texts.jsonl:2: the text None is NoneType, not a string"):
        TASKS[task].prepare(settings.source("train"), tokenizer, (), settings)
    source = DataSettings(format="jsonl", train=str(file), bad_rows="skip").source("train")
    prepared = TASKS[task].prepare(source, tokenizer, (), settings)
    assert len(prepared.examples) == 3 and [bad.line for bad in source.bad] == [2]
    if task == "causal":
        assert prepared.facts == {"bytes": 3} and prepared.examples.lengths.tolist() == [4, 2, 3]
