"""Ragged columns behave as lists of arrays, and Examples refuse columns that do not belong together."""

import numpy as np
import pytest

from jaxlm.data.ragged import Examples, Ragged, offsets_of, spans


def random_ragged(rng, n, longest=7):
    return Ragged.of([rng.integers(0, 99, rng.integers(0, longest + 1)) for _ in range(n)])


def test_as_a_list_of_arrays():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ragged = random_ragged(rng, rng.integers(0, 9))
        rows = [row.tolist() for row in ragged]
        assert [len(row) for row in rows] == ragged.lengths.tolist() and len(rows) == len(ragged)
        if not rows:
            continue
        chosen = rng.integers(0, len(rows), 5)
        padded = ragged.padded(np.append(chosen, -1), 8, -7)
        assert padded.tolist() == [rows[i] + [-7] * (8 - len(rows[i])) for i in chosen] + [[-7] * 8]
        assert ragged[-1].tolist() == rows[-1]


def test_spans():
    rng = np.random.default_rng(1)
    for _ in range(50):
        starts, lengths = rng.integers(0, 50, 6), rng.integers(0, 5, 6)
        expected = [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)]
        assert spans(starts, lengths).tolist() == expected
    assert spans(np.empty(0, int), np.empty(0, int)).size == 0
    assert offsets_of([]).tolist() == [0]


def test_ragged_errors():
    with pytest.raises(ValueError, match="int64"):
        Ragged(np.arange(3), np.array([0, 3], np.int32))
    for offsets in ([0, 2], [1, 3], [0, 2, 1, 3], []):
        with pytest.raises(ValueError, match="offsets must rise"):
            Ragged(np.arange(3), np.array(offsets, np.int64))
    with pytest.raises(ValueError, match="row 1 has 3 values, more than 2"):
        Ragged.of([[1], [1, 2, 3]]).padded(np.array([0, 1]), 2, 0)
    with pytest.raises(IndexError):
        Ragged.of([[1]])[1]


def test_examples():
    ids = Ragged.of([[1, 2], [3]])
    examples = Examples({"input_ids": ids, "labels": np.array([0, 1], np.int32)})
    assert len(examples) == 2 and examples.lengths.tolist() == [2, 1] and examples.decoder_lengths is None
    decoder = Ragged.of([[1], [1, 2, 3]])
    both = Examples({"input_ids": ids, "decoder_input_ids": decoder, "labels": decoder})
    assert both.decoder_lengths.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": Ragged.of([[1]])}, "input_ids"),
        ({"input_ids": Ragged.of([[1]]), "labels": np.zeros(2)}, "number of rows"),
        ({"input_ids": Ragged.of([[1], [2]]), "labels": Ragged.of([[1], [2, 3]])}, "row 1: column 'labels' has 2"),
        ({"input_ids": Ragged.of([[1], [2]]), "labels": np.zeros(2), "group": 2}, "number of rows"),
        ({"input_ids": Ragged.of([[1], [2], [3]]), "group": 2}, "3 texts in column 'input_ids' are no groups of 2"),
    ],
)
def test_examples_errors(columns, message):
    group = columns.pop("group", 1)
    with pytest.raises(ValueError, match=message):
        Examples(columns, group)


def test_examples_that_are_groups():
    pairs = Examples({"input_ids": Ragged.of([[1, 2], [3], [], [4, 5, 6]]), "y": np.zeros(2)}, group=2)
    assert len(pairs) == 2 and pairs.lengths.tolist() == [2, 3]
    both = pairs.then(pairs)
    assert len(both) == 4 and both.lengths.tolist() == [2, 3, 2, 3]
    flat = Examples({"input_ids": pairs.columns["input_ids"]})
    assert Examples(flat.columns, 2).fingerprint() != flat.fingerprint()
    with pytest.raises(ValueError, match="one has groups of 1 texts, the other of 2"):
        flat.then(Examples(flat.columns, 2))


def test_fingerprint_sees_every_difference():
    base = {"input_ids": Ragged.of([[1, 2], [3]]), "y": np.array([0, 1], np.int32)}
    others = [
        base | {"input_ids": Ragged.of([[1], [2, 3]])},
        base | {"input_ids": Ragged.of([[1, 2], [4]])},
        base | {"input_ids": Ragged.of([[1, 2], [3]], np.int64)},
        base | {"y": np.array([1, 0], np.int32)},
        {"input_ids": base["input_ids"], "z": base["y"]},
    ]
    prints = [Examples(columns).fingerprint() for columns in [base, *others]]
    assert len(set(prints)) == len(prints)
    assert Examples(dict(reversed(base.items()))).fingerprint() == prints[0]


def test_examples_behind_examples():
    first = Examples({"input_ids": Ragged.of([[1, 2], [3]], np.uint16), "labels": np.int32([0, 1])})
    second = Examples({"input_ids": Ragged.of([[4], [], [5, 6]]), "labels": np.int32([2, 3, 4])})
    both = first.then(second)
    assert [row.tolist() for row in both.columns["input_ids"]] == [[1, 2], [3], [4], [], [5, 6]]
    assert both.columns["labels"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"one has the columns \['input_ids', 'labels'\], the other \['input_ids'\]"):
        first.then(Examples({"input_ids": second.columns["input_ids"]}))
    with pytest.raises(ValueError, match="'labels' has one value per row in one, one per token in the other"):
        first.then(Examples({"input_ids": second.columns["input_ids"], "labels": second.columns["input_ids"]}))
