"""Ends of sequences, and lengths of batches."""

import json

import numpy as np

from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.tasks import TASKS, Prepared


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


def test_splits_share_the_lengths_of_their_batches():
    """Those that fit the first, and one more for what is longer than all of it."""
    tokenizer, settings = load_tokenizer("character", ["ab"]), DataSettings(max_length=60, buckets=2)
    examples = {
        split: Examples({"input_ids": Ragged.of([np.ones(size) for size in sizes])})
        for split, sizes in {"train": (3, 3, 20, 21), "eval": (5, 50), "test": (9,)}.items()
    }
    together = {split: Prepared(own, {}, tuple(examples.values())) for split, own in examples.items()}
    assert {prepared.buckets(settings) for prepared in together.values()} == {(8, 24, 56)}
    assert Prepared(examples["test"], {}).buckets(settings) == (16,)
    batches = TASKS["sequence"].batches(together["eval"], tokenizer, settings, 1, None)
    assert [batches(step)["input_ids"].shape for step in range(2)] == [(1, 8), (1, 56)]
