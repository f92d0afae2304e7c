"""Corruptions have the shares and exact lengths they promise, can be undone, and are functions of (seed, step)."""

import numpy as np
import pytest

from jaxlm.data.corruption import (
    Spans,
    denoise_spans,
    denoising_length,
    mask_tokens,
    next_sentence_pairs,
    noise_mask,
    span_counts,
)
from jaxlm.data.loader import packed
from jaxlm.data.packing import IGNORED
from jaxlm.data.ragged import Ragged

SENTINELS = np.arange(999, 899, -1, dtype=np.int32)
SPECIAL = np.arange(10, dtype=np.int32)
MASK, END, PAD = 4, 1, 0


def rows(length, batch_size=4, n=40, longest=50, seed=0):
    rng = np.random.default_rng(seed)
    docs = Ragged.of([rng.integers(10, 800, k) for k in rng.integers(1, longest, n)])
    return packed(docs, batch_size, seed, length=length, pad_id=PAD)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# -- masking


def masked(batches, seed=0, **options):
    return mask_tokens(batches, seed, mask_id=MASK, vocab_size=800, special_ids=SPECIAL, **options)


def test_masking_shares():
    plain = rows(256, batch_size=16, n=2000)
    batches = masked(plain)
    real = chosen = hidden = kept = 0
    for step in range(batches.steps_per_epoch):
        before, after = plain(step), batches(step)
        picked = after["labels"] != IGNORED
        assert np.array_equal(after["labels"][picked], before["input_ids"][picked])
        assert np.array_equal(after["input_ids"][~picked], before["input_ids"][~picked])
        assert not np.isin(before["input_ids"][picked], SPECIAL).any()
        assert not (picked & (before["segment_ids"] == 0)).any()
        changed = after["input_ids"][picked & (after["input_ids"] != before["input_ids"])]
        assert not np.isin(changed[changed != MASK], SPECIAL).any()
        real += (before["segment_ids"] > 0).sum()
        chosen += picked.sum()
        hidden += (picked & (after["input_ids"] == MASK)).sum()
        kept += (picked & (after["input_ids"] == before["input_ids"])).sum()
    for share, count, total in ((0.15, chosen, real), (0.8, hidden, chosen), (0.1, kept, chosen)):
        assert abs(count / total - share) < 5 * np.sqrt(share * (1 - share) / total) + 0.001


def test_special_tokens_are_never_masked():
    docs = Ragged.of([np.tile([2, 50, 3], 200)])
    batches = masked(packed(docs, 2, 0, length=100), probability=0.9)
    for step in range(3):
        before, after = packed(docs, 2, 0, length=100)(step), batches(step)
        special = np.isin(before["input_ids"], SPECIAL)
        assert (after["labels"][special] == IGNORED).all() and (after["labels"][~special] != IGNORED).any()


def test_masking_is_a_function_of_seed_and_step():
    batches = masked(rows(32), seed=3)
    assert same(batches(5), masked(rows(32), seed=3)(5))
    assert not same(batches(5), masked(rows(32), seed=4)(5))
    again = batches(5 + batches.steps_per_epoch * 0), batches(6)
    assert not np.array_equal(again[0]["labels"] == IGNORED, again[1]["labels"] == IGNORED)
    with pytest.raises(ValueError, match="shares"):
        masked(rows(32), masked=0.8, randomized=0.3)


# -- denoising


def test_lengths_are_those_of_t5():
    assert denoising_length(512) == Spans(568, 85, 28)
    assert denoising_length(512).target_length == 114
    for length in range(2, 400):
        counts = span_counts(length)
        assert 1 <= counts.spans <= min(counts.noise, length - counts.noise)
        assert counts.input_length + counts.target_length == length + 2 * counts.spans + 2
    for room in range(4, 200):
        counts = denoising_length(room)
        assert counts.input_length <= room < span_counts(counts.length + 1).input_length
    with pytest.raises(ValueError, match="no room"):
        denoising_length(2)


def test_noise_mask_has_exact_counts():
    random = np.random.Generator(np.random.Philox(0))
    for length in (2, 3, 7, 20, 100):
        counts = span_counts(length)
        mask = noise_mask(random, 50, counts)
        starts = (mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]).sum(axis=1)
        assert (mask.sum(axis=1) == counts.noise).all() and (starts == counts.spans).all()
        assert not mask[:, 0].any() and mask[:, -1].all()
    frequency = noise_mask(random, 4000, span_counts(100)).mean(axis=0)
    assert (abs(frequency[5:-9] - 0.14) < 0.05).all()  # even, but for the ends


def undo(inputs, targets):
    """Puts the spans that a target lists back in the places that the sentinels of an input mark."""
    spans, current = {}, None
    for token in targets:
        if token in SENTINELS:
            current = spans[token] = []
        elif token != END:
            current.append(token)
    return [t for token in inputs if token != END for t in (spans[token] if token in SENTINELS else [token])]


@pytest.mark.parametrize("length", [8, 21, 64])
def test_denoising_can_be_undone(length):
    plain = rows(length)
    batches = denoise_spans(plain, 7, sentinels=SENTINELS, end_id=END, pad_id=PAD)
    full = span_counts(length)
    short = 0
    for step in range(plain.steps_per_epoch):
        before, after = plain(step), batches(step)
        assert after["input_ids"].shape == (4, full.input_length) and after["labels"].shape == (4, full.target_length)
        for r in range(4):
            text = before["input_ids"][r][(before["input_ids"][r] != PAD)].tolist()
            inputs = after["input_ids"][r][after["attention_mask"][r] > 0].tolist()
            targets = after["labels"][r][after["labels"][r] != IGNORED].tolist()
            if len(text) < 2:
                assert not targets and after["attention_mask"][r].sum() == 1
                continue
            short += len(text) < length
            assert undo(inputs, targets) == text and inputs[-1] == targets[-1] == END
            counts = span_counts(len(text))
            assert len(inputs) == counts.input_length and len(targets) == counts.target_length
            assert after["decoder_input_ids"][r][: len(targets)].tolist() == [PAD, *targets[:-1]]
            assert after["decoder_attention_mask"][r].sum() == len(targets)
            sentinels = [t for t in targets if t in SENTINELS]
            assert sentinels == SENTINELS[: counts.spans].tolist() == [t for t in inputs if t in SENTINELS]
        assert (after["attention_mask"][:, 0] == 1).all() and (after["decoder_attention_mask"][:, 0] == 1).all()
        assert {a.dtype for a in after.values()} == {np.dtype(np.int32)}
    assert short
    again = denoise_spans(plain, 7, sentinels=SENTINELS, end_id=END, pad_id=PAD)
    assert same(batches(1), again(1)) and not same(batches(1), batches(2))


def test_too_few_sentinels():
    batches = denoise_spans(rows(100), 0, sentinels=SENTINELS[:2], end_id=END, pad_id=PAD)
    with pytest.raises(ValueError, match="need 5 sentinels, the vocabulary has 2"):
        batches(0)


# -- pairs


def test_next_sentence_pairs():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 15, 60)
    documents = np.concatenate([[0], np.cumsum(counts)])
    # every token holds its document and its index in it
    next_index = [0] * len(counts)
    sentences = []
    for document, count in enumerate(counts):
        for _ in range(count):
            size = int(rng.integers(1, 9))
            sentences.append([10 + 1000 * document + next_index[document] + i for i in range(size)])
            next_index[document] += size
    pairs = next_sentence_pairs(Ragged.of(sentences), documents, 0, max_length=32, first_id=2, between_id=3)
    labels = pairs.columns["next_sentence_labels"]
    assert labels.dtype == np.int32 and 0.4 < labels.mean() < 0.75
    seen = set()
    for ids, types, label in zip(pairs.columns["input_ids"], pairs.columns["token_type_ids"], labels, strict=True):
        assert len(ids) <= 32 and ids[0] == 2 and ids[-1] == 3
        between = int(np.flatnonzero(ids == 3)[0])
        first, second = ids[1:between] - 10, ids[between + 1 : -1] - 10
        assert types.tolist() == [0] * (between + 1) + [1] * (len(second) + 1)
        assert len(first) and len(second)
        for passage in (first, second):
            assert np.array_equal(passage, np.arange(passage[0], passage[0] + len(passage)))
        assert (first[0] // 1000 != second[0] // 1000) == bool(label)
        if not label and len(ids) < 32:
            assert second[0] == first[-1] + 1
        seen |= set(first.tolist()) | set(second.tolist())
    assert len(seen) > 0.9 * sum(map(len, sentences))
    again = next_sentence_pairs(Ragged.of(sentences), documents, 0, max_length=32, first_id=2, between_id=3)
    assert again.fingerprint() == pairs.fingerprint()
    with pytest.raises(ValueError, match="two documents"):
        next_sentence_pairs(Ragged.of([[1], [2]]), np.array([0, 2]), 0, max_length=8, first_id=2, between_id=3)
