"""Batches are functions of (seed, step): every example once an epoch, static shapes, no hidden state."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.loader import (
    bucketed,
    fitted,
    generator,
    in_order,
    packed,
    packed_examples,
    steps_per_epoch,
    with_decoder_start,
)
from jaxlm.data.packing import IGNORED
from jaxlm.data.ragged import Examples, Ragged

LENGTHS = range(8, 41, 8)


def examples(n=103, seed=0, **columns):
    """Every token of example i is i + 1."""
    rng = np.random.default_rng(seed)
    ids = Ragged.of([np.full(k, i + 1) for i, k in enumerate(rng.integers(1, 41, n))])
    return Examples({"input_ids": ids, **columns})


def kinds_of(seed=0):
    data = examples(seed=seed)
    return {
        "bucketed": bucketed(data, 8, seed, lengths=LENGTHS),
        "bucketed_drop": bucketed(data, 8, seed, lengths=LENGTHS, remainder="drop"),
        "packed": packed(data.columns["input_ids"], 4, seed, length=32),
        "packed_examples": packed_examples(data, 4, seed, length=48),
        "in_order": in_order(data, 8, lengths=LENGTHS),
    }


def signature(batch):
    return {name: (a.shape, a.dtype) for name, a in batch.items()}


def announced(batches):
    """The signatures of the batches at negative steps: one of every kind."""
    return [signature(batches(-1 - kind)) for kind in range(batches.kinds)]


@pytest.mark.parametrize("kind", kinds_of())
def test_pure_in_seed_and_step(kind):
    first, second = kinds_of()[kind], kinds_of()[kind]
    steps = [0, 40, 3, 97, 3, 1]  # any order, over epochs
    for a, b in zip([first(s) for s in steps], [second(s) for s in reversed(steps)][::-1], strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    reseeded = kinds_of(seed=1)[kind]
    if kind != "in_order":
        assert any(not np.array_equal(first(s)["input_ids"], reseeded(s)["input_ids"]) for s in steps)


@pytest.mark.parametrize("kind", kinds_of())
def test_shapes_are_all_announced(kind):
    batches = kinds_of()[kind]
    signatures = announced(batches)
    assert all(signature(batches(step)) in signatures for step in range(3 * batches.steps_per_epoch))
    assert len(signatures) == batches.kinds == len({str(s) for s in signatures})


@pytest.mark.parametrize("kind", kinds_of())
def test_no_row_is_without_a_token_to_attend(kind):
    batches = kinds_of()[kind]
    for step in (-1, *range(batches.steps_per_epoch)):
        batch = batches(step)
        attended = batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"]
        assert (attended[:, 0] >= 1).all() and attended.dtype == np.int32


def tokens_of_epoch(batches, epoch):
    tokens = []
    for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
        batch = batches(step)
        tokens.append(batch["input_ids"][batch["input_ids"] > 0])
    return np.concatenate(tokens)


@pytest.mark.parametrize("kind", ["bucketed", "packed", "packed_examples", "in_order"])
def test_every_token_once_an_epoch(kind):
    batches, data = kinds_of()[kind], examples()
    epochs = [tokens_of_epoch(batches, epoch) for epoch in (0, 1, 5)]
    for tokens in epochs:
        assert np.array_equal(np.sort(tokens), np.sort(data.columns["input_ids"].values))
    if kind != "in_order":
        assert not np.array_equal(epochs[0], epochs[1])


def test_drop_leaves_out_less_than_a_batch():
    batches = kinds_of()["bucketed_drop"]
    assert batches.steps_per_epoch == 103 // 8
    assert len(np.unique(tokens_of_epoch(batches, 0))) == 96
    with pytest.raises(ValueError, match="make no batch of 200, use remainder='pad'"):
        bucketed(examples(), 200, 0, lengths=LENGTHS, remainder="drop")
    with pytest.raises(ValueError, match="remainder"):
        steps_per_epoch(5, 2, "cut")
    with pytest.raises(ValueError, match="0 rows"):
        steps_per_epoch(0, 2)


def test_bucketing_costs_little_padding_and_shuffles():
    data = examples(2000)
    batches = bucketed(data, 8, 0, lengths=range(4, 41, 4))
    used = total = 0
    widths = []
    for step in range(batches.steps_per_epoch):
        mask = batches(step)["attention_mask"]
        used, total = used + mask.sum(), total + mask.size
        widths.append(mask.shape[1])
    assert used / total > 0.85
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def positions(sizes, buckets):
    """What examples of these sizes take, each padded to the smallest bucket that holds it."""
    return sum(min(b for b in buckets if b >= max(size, 1)) for size in sizes)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 5))
def test_no_other_buckets_take_fewer_positions(sizes, count):
    possible = (8, 16, 24, 32, 40, 48, 56, 60)
    lengths = fitted(np.array(sizes), count, max_length=60)
    last = min(length for length in possible if length >= max(sizes))
    others = itertools.chain.from_iterable(
        itertools.combinations(possible[: possible.index(last)], n) for n in range(count)
    )
    assert len(lengths) <= count and lengths[-1] == last and set(lengths) <= set(possible)
    assert positions(sizes, lengths) == min(positions(sizes, (*chosen, last)) for chosen in others)


def test_buckets_of_long_texts_are_found_on_a_grid():
    sizes = np.random.default_rng(0).integers(1, 100_001, 5000)
    lengths = fitted(sizes, 8, max_length=100_000)
    assert len(lengths) == 8 and lengths[-1] == 100_000
    assert positions(sizes, lengths) < 1.005 * positions(sizes, (*np.quantile(sizes, np.arange(1, 8) / 8), 100_000))


def test_no_examples_need_one_bucket():
    assert fitted(np.array([], np.int64), 8, max_length=20) == (20,)


def test_buckets_are_the_smallest_that_fit():
    batches = bucketed(examples(), 8, 0, lengths=(8, 20, 40))
    for step in range(batches.steps_per_epoch):
        longest = batches(step)["attention_mask"].sum(axis=1).max()
        assert batches(step)["attention_mask"].shape[1] == min(b for b in (8, 20, 40) if b >= longest)
    assert bucketed(Examples({"input_ids": Ragged.of([[1] * 3])}), 2, 0, lengths=LENGTHS).kinds == 1
    with pytest.raises(ValueError, match=r"more than the longest bucket, 16"):
        bucketed(examples(), 8, 0, lengths=(8, 16))


def test_filler_rows_are_ignored():
    n = 5
    whole, real = np.arange(n, dtype=np.int32), np.linspace(0, 1, n, dtype=np.float32)
    ids = examples(n).columns["input_ids"]
    for labels, ignored in ((whole, lambda x: x == IGNORED), (real, np.isnan), (ids, lambda x: (x == IGNORED).all(1))):
        batches = in_order(Examples({"input_ids": ids, "labels": labels}), 4, lengths=LENGTHS, pad_id=9)
        last = batches(1)
        assert last["row"].tolist()[1:] == [-1, -1, -1] and last["row"].dtype == np.int32
        assert ignored(last["labels"]).tolist() == [False, True, True, True]
        assert last["labels"].dtype == labels.values.dtype if isinstance(labels, Ragged) else labels.dtype
        assert (last["input_ids"][1:] == 9).all() and last["attention_mask"][1:].sum() == 3


def test_labels_stay_with_their_rows():
    data = examples(50, labels=np.arange(1, 51, dtype=np.int32))
    for batches in (bucketed(data, 8, 0, lengths=LENGTHS), in_order(data, 8, lengths=LENGTHS)):
        for step in range(batches.steps_per_epoch):
            batch = batches(step)
            assert np.array_equal(
                batch["labels"], np.where(batch["input_ids"][:, 0], batch["input_ids"][:, 0], IGNORED)
            )


def test_in_order_visits_each_example_once_sorted_by_length():
    batches = in_order(examples(), 8, lengths=LENGTHS)
    rows = np.concatenate([batches(s)["row"] for s in range(batches.steps_per_epoch)])
    assert sorted(rows[rows >= 0]) == list(range(103)) and (rows[103:] == -1).all()
    widths = [batches(s)["input_ids"].shape[1] for s in range(batches.steps_per_epoch)]
    assert widths == sorted(widths)


def test_decoder_lengths_follow_the_bucket_of_the_input():
    rng = np.random.default_rng(0)
    ids = examples(200).columns["input_ids"]
    targets = Ragged.of([np.full(rng.integers(1, max(n // 2, 2)), i + 1) for i, n in enumerate(ids.lengths)])
    data = Examples({"input_ids": ids, "decoder_input_ids": targets, "labels": targets})
    batches = bucketed(data, 8, 0, lengths=LENGTHS, pad_id=0)
    assert batches.kinds <= len(LENGTHS)
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        assert batch["labels"].shape == batch["decoder_input_ids"].shape == batch["decoder_attention_mask"].shape
        assert batch["labels"].shape[1] <= batch["input_ids"].shape[1]
        assert np.array_equal(batch["labels"] != IGNORED, batch["decoder_input_ids"] > 0)
    long = Examples({"input_ids": Ragged.of([[1]]), "decoder_input_ids": Ragged.of([[1] * 50])})
    assert bucketed(long, 1, 0, lengths=LENGTHS)(0)["decoder_input_ids"].shape == (1, 56)


def test_a_decoder_starts_with_the_id_of_its_model():
    """Filler rows and announced shapes too; nothing else changes, and the batches made before keep their start."""
    targets = Ragged.of([[0, 5, 6], [0, 7], [0]])
    data = Examples({"input_ids": Ragged.of([[1], [2], [3]]), "decoder_input_ids": targets, "labels": targets})
    plain = bucketed(data, 2, 0, lengths=LENGTHS)
    batches = with_decoder_start(plain, 9)
    for step in (-1, 0, 1, 7):
        batch, before = batches(step), plain(step)
        assert (batch["decoder_input_ids"][:, 0] == 9).all() and (before["decoder_input_ids"][:, 0] == 0).all()
        before["decoder_input_ids"][:, 0] = 9
        assert batch.keys() == before.keys() and all(np.array_equal(batch[n], a) for n, a in before.items())
    assert announced(batches) == announced(plain)
    without = kinds_of()["packed"]
    assert with_decoder_start(without, 9) is without and with_decoder_start(plain, None) is plain


def test_packed_in_order_for_evaluation():
    docs = Ragged.of([np.arange(1, 30), np.arange(100, 110)])
    batches = packed(docs, 2, None, length=8)
    ids = np.concatenate([batches(s)["input_ids"] for s in range(batches.steps_per_epoch)])
    assert ids.ravel()[:39].tolist() == docs.values.tolist()
    labels = np.concatenate([batches(s)["labels"] for s in range(batches.steps_per_epoch)])
    assert (labels != IGNORED).sum() == 39 - 2  # every token but the first of each document


def test_long_documents_are_cut_in_other_places_every_epoch():
    docs = Ragged.of([np.arange(1, 1000)])
    batches = packed(docs, 4, 0, length=16)
    starts = [
        {
            int(t) % 16
            for s in range(batches.steps_per_epoch)
            for t in batches(e * batches.steps_per_epoch + s)["input_ids"][:, 0]
        }
        for e in range(4)
    ]
    assert len({frozenset(s) for s in starts}) > 1
    for epoch in range(4):
        assert sorted(tokens_of_epoch(batches, epoch)) == list(range(1, 1000))


def test_packed_examples_stay_whole():
    data = examples(labels=examples().columns["input_ids"])
    batches = packed_examples(data, 4, 0, length=48)
    sizes = {}
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                tokens = ids[segments == segment]
                if tokens[0]:
                    assert (tokens == tokens[0]).all() and tokens[0] not in sizes
                    sizes[int(tokens[0])] = len(tokens)
        assert np.array_equal(batch["labels"], np.where(batch["input_ids"] > 0, batch["input_ids"], IGNORED))
    assert sizes == {i + 1: int(n) for i, n in enumerate(data.lengths)}
    with pytest.raises(ValueError, match=r"not \['labels'\]"):
        packed_examples(examples(3, labels=np.zeros(3, np.int32)), 1, 0, length=48)


def test_generator_keys():
    draws = {tuple(generator(*key).integers(0, 2**60, 2)) for key in ((0, 0), (0, 1), (1, 0), (0,), (0, -1), (2**32,))}
    assert len(draws) == 6
    assert generator(1, 2).random() == generator(1, 2).random()


def test_map_gives_the_step():
    batches = kinds_of()["packed"].map(lambda batch, step: batch | {"step": np.array(step)})
    assert batches(11)["step"] == 11 and announced(batches)[0]["step"][0] == ()


# Groups of texts ------------------------------------------------------------------------------------------------------


def groups(n=29, size=3, seed=0, **columns):
    """Every token of text t of example i is 10 i + t + 1; some texts are empty."""
    lengths = np.random.default_rng(seed).integers(0, 41, (n, size))
    ids = Ragged.of([np.full(k, 10 * i + t + 1) for i, row in enumerate(lengths) for t, k in enumerate(row)])
    return Examples({"input_ids": ids, "token_type_ids": ids, "labels": np.arange(n, dtype=np.int32), **columns}, size)


@pytest.mark.parametrize("kind", ["bucketed", "bucketed_drop", "in_order"])
def test_a_group_is_a_row(kind):
    data, seen = groups(gold=np.arange(58.0).reshape(29, 2)), []
    if kind == "in_order":
        batches = in_order(data, 8, lengths=LENGTHS, pad_id=0)
    else:
        batches = bucketed(data, 8, 0, lengths=LENGTHS, remainder="drop" if kind == "bucketed_drop" else "pad")
    assert batches.steps_per_epoch == (3 if kind == "bucketed_drop" else 4)
    signatures = announced(batches)
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        assert signature(batch) in signatures
        width = batch["input_ids"].shape[-1]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 3, width)
        np.testing.assert_array_equal(batch["token_type_ids"], batch["input_ids"])
        longest = max(data.lengths[i] for i in batch["labels"] if i >= 0)
        assert width == min(edge for edge in LENGTHS if edge >= longest)
        for row, i in enumerate(batch["labels"]):
            for text in range(3):
                tokens = data.columns["input_ids"][3 * i + text] if i >= 0 else np.empty(0)
                expected = np.zeros(width)
                expected[: len(tokens)] = tokens
                np.testing.assert_array_equal(batch["input_ids"][row, text], expected)
                assert batch["attention_mask"][row, text].sum() == max(len(tokens), 1)
            assert i == IGNORED or batch["gold"][row].tolist() == [2 * i, 2 * i + 1]
        seen += [i for i in batch["labels"] if i >= 0]
    assert len(seen) == len(set(seen)) == (24 if kind == "bucketed_drop" else 29)


def test_groups_of_one_are_texts():
    texts = examples(labels=np.arange(103, dtype=np.int32))
    one = bucketed(Examples(texts.columns, group=1), 8, 0, lengths=LENGTHS)
    many = bucketed(texts, 8, 0, lengths=LENGTHS)
    assert all((one(step)[name] == many(step)[name]).all() for step in range(13) for name in many(step))


def test_a_decoder_reads_groups_too():
    target = Ragged.of([[1, 2], [3], [4, 5, 6], [7]])
    data = Examples({"input_ids": Ragged.of([[1], [2], [3], [4]]), "decoder_input_ids": target, "labels": target}, 2)
    assert data.decoder_lengths.tolist() == [2, 3]
    batch = with_decoder_start(in_order(data, 2, lengths=(8,)), 9)(0)
    assert batch["decoder_input_ids"].shape == batch["decoder_attention_mask"].shape == batch["labels"].shape
    assert batch["decoder_input_ids"][..., :3].tolist() == [[[9, 2, 0], [9, 0, 0]], [[9, 5, 6], [9, 0, 0]]]


def test_groups_are_not_packed():
    data = Examples({"input_ids": groups().columns["input_ids"]}, 3)
    with pytest.raises(ValueError, match="groups of 3 texts cannot be packed"):
        packed_examples(data, 4, 0, length=48)
