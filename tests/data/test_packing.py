"""Packing keeps every token once, restarts segments and positions, and predicts only within a document."""

import time

import numpy as np
import pytest

from jaxlm.data.packing import IGNORED, best_fit, cut, join, lay_out
from jaxlm.data.ragged import Ragged


def documents(rng, n, longest):
    lengths = rng.integers(0, longest + 1, n)
    return Ragged.of(
        np.split(np.arange(lengths.sum()) + 10, np.cumsum(lengths)[:-1])
    )  # every token is unlike all others


def test_joined_rows_against_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(60):
        docs, length = documents(rng, int(rng.integers(1, 9)), 12), int(rng.integers(1, 10))
        order = rng.permutation(len(docs))
        stream = [(token, i, at) for i, d in enumerate(order) for at, token in enumerate(docs[d].tolist())]
        joined = join(docs, length, order)
        assert joined.rows == -(-len(stream) // length) and joined.total == len(stream)
        batch = cut(joined, np.arange(joined.rows + 1), pad_id=3, sizes=docs.values % 5)
        for r in range(joined.rows + 1):
            row = stream[r * length : (r + 1) * length]
            segment = position = 0
            for t in range(length):
                if t >= len(row):
                    expected = (3, 0, 0, IGNORED, 0)
                else:
                    token, document, at = row[t]
                    new = t == 0 or row[t - 1][1] != document
                    segment, position = segment + new, 0 if new else position + 1
                    last = at == len(docs[order[document]]) - 1
                    named = (IGNORED, 0) if last else (token + 1, (token + 1) % 5)
                    expected = (token, segment, position, *named)
                got = tuple(int(batch[n][r, t]) for n in ("input_ids", "segment_ids", "positions", "labels", "bytes"))
                assert got == expected
        assert {a.dtype for a in batch.values()} == {np.dtype(np.int32)}


def test_a_shift_moves_the_cuts_and_loses_nothing():
    docs = Ragged.of([np.arange(10, 33), np.arange(50, 55)])
    for shift in range(8):
        batch = cut(join(docs, 8, np.array([0, 1]), shift), np.arange(4))
        tokens = batch["input_ids"][batch["segment_ids"] > 0]
        assert sorted(tokens) == sorted(docs.values) and tokens[0] == 10 + shift
        predicted = batch["labels"] != IGNORED
        assert np.array_equal(batch["labels"][predicted], batch["input_ids"][predicted] + 1)
        assert predicted.sum() == 28 - 2 - (shift > 0)
    with pytest.raises(ValueError, match="shift 5"):
        join(docs, 8, np.array([1, 0]), 5)


def test_padding_rows_do_not_share_memory():
    batch = cut(join(Ragged.of([[1, 2]]), 2), np.array([-1]))
    arrays = list(batch.values())
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_best_fit_packs_whole_examples_once_and_well():
    rng = np.random.default_rng(0)
    for _ in range(100):
        capacity = int(rng.integers(1, 30))
        lengths = rng.integers(1, capacity + 1, rng.integers(0, 40))
        rows = best_fit(lengths, capacity)
        assert sorted(rows.values) == list(range(len(lengths)))
        loads = [lengths[row].sum() for row in rows]
        assert all(load <= capacity for load in loads)
        assert len(rows) <= 11 / 9 * max(-(-lengths.sum() // capacity), (2 * lengths > capacity).sum()) * 1.25 + 1
        # no row would fit into another: best fit never opens a row it does not need
        assert all(a + b > capacity for i, a in enumerate(loads) for b in loads[:i] if a and b) or len(rows) < 2
    with pytest.raises(ValueError, match="example 1 has 9 tokens"):
        best_fit(np.array([1, 9]), 8)
    assert best_fit(np.array([3, 0, 2]), 5).values.tolist() == [0, 2]


def test_row_count_depends_on_lengths_alone():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 60, 500)
    assert len({len(best_fit(rng.permutation(lengths), 64)) for _ in range(5)}) == 1


def test_lay_out_against_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(60):
        docs = documents(rng, int(rng.integers(4, 12)), 9)
        packed = best_fit(docs.lengths, 12)
        columns = {"input_ids": docs, "labels": Ragged(docs.values * 2, docs.offsets)}
        rows = np.append(rng.permutation(len(packed)), -1)
        batch = lay_out(columns, packed, rows, 12, {"input_ids": 1, "labels": IGNORED})
        for r, row in enumerate(rows):
            ids, segments, positions = [], [], []
            for number, example in enumerate(packed[row] if row >= 0 else []):
                ids += docs[example].tolist()
                segments += [number + 1] * len(docs[example])
                positions += range(len(docs[example]))
            free = 12 - len(ids)
            assert batch["input_ids"][r].tolist() == ids + [1] * free
            assert batch["labels"][r].tolist() == [2 * i for i in ids] + [IGNORED] * free
            assert batch["segment_ids"][r].tolist() == segments + [0] * free
            assert batch["positions"][r].tolist() == positions + [0] * free


def test_a_million_tokens_a_second():
    rng = np.random.default_rng(0)
    docs = Ragged.of([rng.integers(0, 99, n) for n in rng.integers(1, 400, 2500)])
    joined = join(docs, 256, rng.permutation(len(docs)))
    start = time.process_time()
    for first in range(0, joined.rows, 32):
        cut(joined, np.arange(first, first + 32))
    assert joined.total / (time.process_time() - start) > 1e6
    start = time.process_time()
    packed = best_fit(docs.lengths, 512)
    for first in range(0, len(packed) - 32, 32):
        lay_out({"input_ids": docs}, packed, np.arange(first, first + 32), 512, {})
    assert joined.total / (time.process_time() - start) > 1e6
