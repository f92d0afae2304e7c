"""Bits per byte: every byte of the original text belongs to one token, whatever the tokenizer and however it is cut."""

import functools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxlm.data import encoding
from jaxlm.data.encoding import bytes_between, encode
from jaxlm.data.loader import packed
from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.evaluate.evaluator import example_columns, result_metrics
from jaxlm.tasks import TASKS, BatchPredictions

ENGLISH = "It was late , is n't it ? Yes ! We do n't know . Snow fell on the old roofs all night .\n"
CHINESE = "今天天气很好，我们去公园散步吧。😀 é e\u0301 \u200d\n"


def metaspace():
    """Bytes where no piece is known, and a space before the text, as in Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator([ENGLISH * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def tokenizer_of(kind):
    return metaspace() if kind == "metaspace" else load_tokenizer(kind, [ENGLISH * 9, CHINESE])


KINDS = ("bpe:300", "metaspace", "wordpiece:120", "character")
TEXTS = st.lists(
    st.text(st.sampled_from("abZ .'\n\t\x07\x00好天é\u0301\u200d\xa0▁😀") | st.characters(codec="utf-8")), max_size=4
)


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(texts=TEXTS, length=st.integers(1, 12), batch_size=st.integers(1, 3))
def test_rows_hold_the_bytes_of_the_text(kind, begin, texts, length, batch_size):
    """With a begin token all of them; without one those of a document's first token are predicted by nobody."""
    first = [1] if begin else []
    encoded = encode(tokenizer_of(kind), texts, special_tokens=False, before=first, after=[2], count_bytes=True)
    assume(len(encoded.ids.values))
    batches = packed(encoded.ids, batch_size, None, length=length, sizes=encoded.bytes)
    batch = {name: np.concatenate([batches(i)[name] for i in range(batches.steps_per_epoch)]) for name in batches(0)}
    sizes = [len(text.encode()) for text in texts]
    assert [int(row.sum()) for row in encoded.bytes] == sizes
    assert batch["bytes"].sum() == sum(sizes) - sum(int(row[0]) for row in encoded.bytes)
    assert not batch["bytes"][batch["labels"] == -100].any() and batch["bytes"].dtype == np.int32
    if begin:
        assert not any(row[0] for row in encoded.bytes)
    assert batches(-1)["bytes"].shape == batches(0)["bytes"].shape and not batches(-1)["bytes"].any()


def test_bytes_are_those_of_the_tokens():
    """Of characters, each its own; of byte-level pieces, up to the end of the character in which a piece ends."""
    text = CHINESE + ENGLISH
    widths = [len(character.encode()) for character in text]
    sizes = encode(tokenizer_of("character"), [text], before=[0], after=[0], count_bytes=True).bytes[0]
    assert sizes.tolist() == [0, *widths, 0]
    tokenizer = tokenizer_of("bpe:300")
    encoded = encode(tokenizer, [text], before=[0], after=[0], count_bytes=True)
    pieces = tokenizer.convert_ids_to_tokens(encoded.ids[0][1:-1].tolist())  # one character stands for one byte
    ends = np.cumsum([len(piece) for piece in pieces])
    borders = np.cumsum(widths)
    assert np.array_equal(np.cumsum(encoded.bytes[0][1:-1]), borders[np.searchsorted(borders, ends)])


def test_of_the_tokens_in_one_character_the_first_has_its_bytes():
    assert bytes_between("a😀", [1, 2, 2, 2]).tolist() == [1, 4, 0, 0, 0]
    assert bytes_between("好 b", [1, 0, 3]).tolist() == [3, 0, 2, 0]
    assert bytes_between("ab", []).tolist() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_long_text_add_up(kind, monkeypatch):
    texts = [ENGLISH * 3 + CHINESE * 2 + ENGLISH, "", ENGLISH]
    whole = encode(tokenizer_of(kind), texts, special_tokens=False, after=[2], count_bytes=True)
    monkeypatch.setattr(encoding, "LONG", 40)
    encoded = encode(tokenizer_of(kind), texts, special_tokens=False, after=[2], count_bytes=True, chunk=2)
    assert np.array_equal(encoded.ids.values, whole.ids.values)
    assert [row.sum() for row in encoded.bytes] == [len(text.encode()) for text in texts]
    assert [row.sum() for row in whole.bytes] == [len(text.encode()) for text in texts]


def test_what_no_token_stands_for_belongs_to_the_next_one(monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"b": 0, "c": 1}, []))  # knows no other letter, and has no token for them
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    monkeypatch.setattr(encoding, "LONG", 3)
    monkeypatch.setattr(encoding, "WINDOW", 5)
    text = "aaaa aaaa bc aaaa"
    assert all(tokenizer(piece)["input_ids"] for piece in encoding.pieces(backend, text))
    for after, counts in (([1], [11, 1, 5]), ([], [11, 6])):
        encoded = encode(tokenizer, [text, ""], special_tokens=False, after=after, count_bytes=True)
        assert encoded.bytes[0].tolist() == counts and not encoded.bytes[1].any()


def evaluated(tmp_path, kind, split="eval"):
    """Prepared data of a split, and its batches."""
    (tmp_path / "text.txt").write_text((ENGLISH + CHINESE) * 3)
    config = DataSettings(train=str(tmp_path / "text.txt"), eval=str(tmp_path / "text.txt"), max_length=16)
    task, tokenizer = TASKS["causal"], tokenizer_of(kind)
    prepared = task.prepare(config.source(split), tokenizer, (), config)
    return prepared, task.batches(prepared, tokenizer, config, 4, None)


def test_only_what_is_measured_on_has_its_bytes_counted(tmp_path):
    for split in ("train", "eval"):
        prepared, batches = evaluated(tmp_path, "bpe:300", split)
        assert ("bytes" in prepared.examples.columns) == ("bytes" in batches(0)) == (split == "eval")
        assert prepared.facts == {"bytes": len(((ENGLISH + CHINESE) * 3).encode())}


@pytest.mark.parametrize("kind", ["bpe:300", "wordpiece:120"])
def test_the_report_and_the_result_divide_by_the_same_bytes(tmp_path, kind):
    """Both against the likelihoods themselves."""
    import jax.numpy as jnp

    spec, tokenizer = TASKS["causal"].evaluation, tokenizer_of(kind)
    prepared, batches = evaluated(tmp_path, kind)
    predictions, nats, right = [], 0.0, 0
    draw = np.random.default_rng(0)
    for number in range(batches.steps_per_epoch):
        batch = batches(number)
        logits = draw.normal(size=(*batch["labels"].shape, len(tokenizer))).astype(np.float32)
        read = spec.read({"logits": jnp.asarray(logits)}, {name: jnp.asarray(array) for name, array in batch.items()})
        read = {name: np.asarray(array) for name, array in read.items()}
        predictions.append(BatchPredictions(read, teacher=None, batch=batch, labels=()))
        likelihood = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        real = batch["labels"] >= 0
        nats -= likelihood[real, batch["labels"][real]].sum()
        right += (logits.argmax(-1) == batch["labels"]).sum()
    columns = example_columns(spec, predictions)
    first = prepared.examples.columns["bytes"][0][0]
    size = prepared.facts["bytes"] - (0 if kind == "bpe:300" else first)
    assert columns["bytes"].sum() == size and (first == 0) == (kind == "bpe:300")
    metrics = result_metrics(spec, columns, 0, prepared.facts)
    stored = spec.reported(columns)
    assert metrics.keys() == {"loss", "perplexity", "accuracy", "bits_per_byte"}
    assert stored.keys() == {"nats", "tokens", "bytes"} and len(stored["nats"]) == batches.steps_per_epoch
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["loss"] == pytest.approx(nats / columns["tokens"].sum(), rel=1e-5)
    assert metrics["accuracy"] == right / columns["tokens"].sum()
    assert {metric.name: metric.over(stored, 0) for metric in spec.compared} == {
        name: metrics[name] for name in ("bits_per_byte", "perplexity")
    }


def test_text_without_a_byte_has_no_bits_per_byte():
    columns = {"nats": np.ones(1), "tokens": np.ones(1, np.int64), "right": np.zeros(1, np.int64)}
    for nothing in ({}, {"bytes": np.zeros(1, np.int64)}):
        assert "bits_per_byte" not in result_metrics(TASKS["causal"].evaluation, columns | nothing, 0, {"bytes": 7})
