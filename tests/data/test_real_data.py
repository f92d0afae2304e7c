"""The public data sets of docs/data.md are read whole, with the numbers of rows their authors state."""

from collections import Counter

import numpy as np
import pytest

from jaxlm.data import Examples, bucketed, encode, fitted, in_order, load_tokenizer, packed, read

pytestmark = pytest.mark.data


@pytest.mark.parametrize(
    ("file", "sentences", "tokens", "persons"),
    [
        ("wnut17train.conll", 3394, 62730, 660),
        ("emerging.dev.conll", 1009, 15733, 470),
        ("emerging.test.annotated", 1287, 23394, 429),
    ],
)
def test_wnut17(data_path, file, sentences, tokens, persons):
    source = read("conll", str(data_path / "wnut17" / file))
    tags = Counter(tag for record in source for tag in record["tags"])
    assert source.rows == sentences and tags.total() == tokens and tags["B-person"] == persons
    assert len(tags) == 13  # six types, begin and inside, and O
    assert all(len(record["tokens"]) == len(record["tags"]) for record in source)


@pytest.mark.parametrize(("file", "rows", "positive"), [("train", 6920, 3610), ("dev", 872, 444), ("test", 1821, 909)])
def test_sst2(data_path, file, rows, positive):
    source = read("tsv", str(data_path / "sst2" / f"{file}.tsv"), columns=("text", "label"))
    labels = Counter(record["label"] for record in source)
    assert labels == {"1": positive, "0": rows - positive}


@pytest.mark.parametrize(("file", "rows"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_stsb_has_no_quoting(data_path, file, rows):
    names = ("genre", "file", "year", "id", "label", "text", "text_pair", "...")
    records = list(read("tsv", str(data_path / "stsb" / f"sts-{file}.tsv"), columns=names))
    assert len(records) == rows and all(0 <= float(r["label"]) <= 5 for r in records)
    if file == "train":
        assert any(r["text"].count('"') % 2 for r in records)
    strict = read("tsv", str(data_path / "stsb" / f"sts-{file}.tsv"), columns=names[:-1], bad_rows="skip")
    assert strict.rows + len(strict.bad) == rows and "9 fields, expected 7" in strict.bad[0].reason


@pytest.mark.parametrize(("file", "rows"), [("train", 10003), ("test", 3080)])
def test_banking77(data_path, file, rows):
    source = read("csv", str(data_path / "banking77" / f"{file}.csv"), columns={"text": "text", "label": "category"})
    assert source.rows == rows and len({record["label"] for record in source}) == 77


def test_waimai_has_a_byte_order_mark(data_path):
    source = read("csv", str(data_path / "waimai_10k" / "waimai_10k.csv"), columns={"text": "review", "label": "label"})
    assert Counter(r["label"] for r in source) == {"1": 4000, "0": 7987}


@pytest.mark.parametrize(("file", "rows"), [("train", 7473), ("test", 1319)])
def test_gsm8k(data_path, file, rows):
    columns = {"source": "question", "target": "answer"}
    source = read("jsonl", str(data_path / "gsm8k" / f"{file}.jsonl"), columns=columns)
    assert source.rows == rows and all("####" in record["target"] for record in source)


def test_other_rows(data_path):
    rows = {
        ("jsonl", "scitldr_a/*.jsonl"): 1992 + 619 + 618,
        ("jsonl", "llamafactory_demo/c4_demo.jsonl"): 300,
        ("csv", "crows_pairs/crows_pairs_anonymized.csv"): 1508,
        ("tsv", "winogender/all_sentences.tsv"): 720,
    }
    assert {key: read(key[0], str(data_path / key[1])).rows for key in rows} == rows
    assert read("tsv", str(data_path / "tatoeba_cmn_eng/cmn.txt"), columns=("source", "target")).rows == 20133
    triples = [
        read("tsv", str(data_path / "umls" / f"{s}.txt"), columns=("h", "r", "t")).rows for s in ("train", "test")
    ]
    assert triples == [5216, 661]


def test_tinyshakespeare_by_characters(data_path):
    path = str(data_path / "tinyshakespeare" / "input.txt")
    (whole,) = [record["text"] for record in read("text", path)]
    (train,) = [record["text"] for record in read("text", path + "[:90%]")]
    (held_out,) = [record["text"] for record in read("text", path + "[90%:]")]
    assert len(whole) == 1_115_394 and len(train) == 1_003_854 and train + held_out == whole
    tokenizer = load_tokenizer("character", [whole])
    assert len(set(whole)) == 65 and len(tokenizer) == 68  # and three special tokens
    ids = encode(tokenizer, [held_out]).ids
    batches = packed(ids, 64, None, length=64)
    predicted = sum((batches(s)["labels"] >= 0).sum() for s in range(batches.steps_per_epoch))
    assert predicted == len(held_out) - 1
    assert tokenizer.decode(batches(0)["input_ids"][0]) == held_out[:64]


def test_padding_of_sst2(data_path):
    records = list(read("tsv", str(data_path / "sst2" / "train.tsv"), columns=("text", "label")))
    tokenizer = load_tokenizer("wordpiece:4000", [r["text"] for r in records])
    ids = encode(tokenizer, [r["text"] for r in records], max_length=128).ids
    examples = Examples({"input_ids": ids, "labels": np.array([int(r["label"]) for r in records], np.int32)})
    for batches in (
        bucketed(examples, 32, 0, lengths=fitted(examples.lengths, 8, 128)),
        in_order(examples, 32, lengths=fitted(examples.lengths, 8, 128)),
    ):
        masks = [batches(step)["attention_mask"] for step in range(batches.steps_per_epoch)]
        assert sum(m.sum() for m in masks) >= 0.8 * sum(m.size for m in masks)
        assert batches.kinds <= 8
