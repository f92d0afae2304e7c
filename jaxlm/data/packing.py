"""Packing: many documents or examples in one row, so that little is padding.

Two ways. Joining and cutting (for pre-training) concatenates all documents and cuts the stream in rows: only the last
row has padding, and documents are split at row ends. Best fit (for fine-tuning) keeps every example whole and fills
rows as well as it can. In both, ``segment_ids`` separate documents in attention and ``positions`` restart in each.
"""

from dataclasses import dataclass

import numpy as np

from jaxlm.data.ragged import Ragged, offsets_of, spans

IGNORED = -100  # the label of a position that is not predicted

Batch = dict[str, np.ndarray]


def counted(labels: np.ndarray) -> np.ndarray:
    """Which labels count, bool of their shape: integers that are not IGNORED, floats that are not NaN."""
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORED


@dataclass(frozen=True)
class Joined:
    """A stream of pieces of ``values`` (documents, mostly), concatenated and cut in rows of ``length`` tokens.

    Only the order is stored; ``cut`` gathers rows.

    Attributes:
      values: tokens of all documents; not copied, as they may be mapped from a file.
      starts: int64 [pieces], where each piece begins in ``values``.
      ends: int64 [pieces], where it ends in the stream.
      length: tokens of a row.
    """

    values: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    length: int

    @property
    def total(self) -> int:
        """Tokens in the stream."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def rows(self) -> int:
        return -(-self.total // self.length)


def join(documents: Ragged, length: int, order: np.ndarray | None = None, shift: int = 0) -> Joined:
    """The stream of ``documents[order]`` (of all in order when ``order`` is None), without the empty ones.

    ``shift`` moves that many tokens from the beginning of the first document to the end of the stream, which moves
    every cut: long documents are then not cut at the same tokens every epoch.
    """
    order = np.arange(len(documents)) if order is None else np.asarray(order)
    lengths = documents.lengths[order]
    starts, lengths = documents.offsets[:-1][order][lengths > 0], lengths[lengths > 0]
    if shift:
        if shift >= lengths[0]:
            raise ValueError(f"shift {shift} does not leave a token of the first document, of {lengths[0]}")
        starts, lengths = np.append(starts, starts[0]), np.append(lengths, shift)
        starts[0] += shift
        lengths[0] -= shift
    return Joined(documents.values, starts, np.cumsum(lengths, dtype=np.int64), length)


def cut(joined: Joined, rows: np.ndarray, pad_id: int = 0, sizes: np.ndarray | None = None) -> Batch:
    """Gathers rows of the stream; row -1 (or any beyond the end) is padding.

    Returns int32 ``[len(rows), length]``: ``input_ids``; ``segment_ids`` 1, 2, .. by document, 0 on padding;
    ``positions`` from 0 in every segment (so also where a row begins inside a document); ``labels``, the document's
    next token, IGNORED at its end and on padding. At the end of a row inside a document that next token is the first
    of the next row: a document of n tokens has n - 1 labels, however it is cut. With ``sizes``, the bytes of text of
    each of ``joined.values``, also ``bytes``: those of the token that is the label, 0 where the label is IGNORED.
    """
    values, ends, length, total = joined.values, joined.ends, joined.length, joined.total
    # Index of every token in the stream.
    row_start = np.where(rows >= 0, rows, joined.rows).astype(np.int64)[:, None] * length
    index = row_start + np.arange(length)
    real = index < total
    if not real.any():
        fill = {"input_ids": pad_id, "segment_ids": 0, "positions": 0, "labels": IGNORED}
        fill |= {} if sizes is None else {"bytes": 0}
        return {name: np.full(index.shape, value, np.int32) for name, value in fill.items()}
    index = np.minimum(index, total - 1)
    # Its document, and its index in `values` and that of the next token.
    document = _document_of(index, ends)
    document_start = np.where(document > 0, ends[document - 1], 0)
    source = joined.starts[document] + index - document_start
    next_source = np.minimum(source + 1, len(values) - 1)
    next_token = values[next_source].astype(np.int32)  # signed, as IGNORED is negative
    has_next = real & (index + 1 < ends[document])
    batch = {
        "input_ids": np.where(real, values[source], pad_id).astype(np.int32),
        "segment_ids": np.where(real, document - document[:, :1] + 1, 0).astype(np.int32),
        "positions": np.where(real, index - np.maximum(document_start, row_start), 0).astype(np.int32),
        "labels": np.where(has_next, next_token, IGNORED).astype(np.int32),
    }
    return batch if sizes is None else batch | {"bytes": np.where(has_next, sizes[next_source], 0).astype(np.int32)}


def _document_of(index: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The document of every index in the stream, int [rows, length]; indices increase along a row.

    Most rows lie in one document: only the others are searched token by token.
    """
    first = np.searchsorted(ends, index[:, 0], side="right")
    last = np.searchsorted(ends, index[:, -1], side="right")
    document = np.repeat(first[:, None], index.shape[1], axis=1)
    for row in np.flatnonzero(last > first):
        document[row] = np.searchsorted(ends, index[row], side="right")
    return document


def best_fit(lengths: np.ndarray, capacity: int) -> Ragged:
    """Packs whole examples into rows of ``capacity`` tokens, longest first, each in the fullest row that has room.

    Best-fit decreasing needs at most 11/9 of the optimal number of rows, plus a constant.

    Returns a Ragged of int64 example numbers, one sequence per row. Examples of length 0 are left out.
    Raises ValueError if an example is longer than ``capacity``.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"example {lengths.argmax()} has {lengths.max()} tokens, more than a row of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by free space
    available = 0  # bit s is set if some row has s tokens free
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == 0:
            break
        fitting = available >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                available &= ~(1 << space)
            rows[row].append(example)
        else:
            space, row = capacity, len(rows)
            rows.append([example])
        open_rows[space - length].append(row)
        available |= 1 << (space - length)
    return Ragged.of(rows, np.int64)


def lay_out(columns: dict[str, Ragged], packed: Ragged, rows: np.ndarray, length: int, fill: dict[str, int]) -> Batch:
    """Packed rows: ``[len(rows), length]`` per column, the examples of a row concatenated; row -1 is padding.

    Adds ``segment_ids`` (1, 2, .. by example, 0 on padding) and ``positions`` (from 0 in each), both int32.
    """
    # The examples of each row, and their tokens.
    first, counts = packed.spans_of(rows)
    counts = np.where(rows >= 0, counts, 0)
    examples = packed.values[spans(first, counts)]
    starts, lengths = next(iter(columns.values())).spans_of(examples)  # those of every column
    row_lengths = np.add.reduceat(np.append(lengths, 0), offsets_of(counts)[:-1]) * (counts > 0)
    real = np.arange(length) < row_lengths[:, None]
    number = np.arange(len(examples)) - np.repeat(offsets_of(counts)[:-1], counts)
    batch = {}
    for name, values in {
        "segment_ids": np.repeat(number + 1, lengths),
        "positions": spans(np.zeros_like(lengths), lengths),
        **{name: column.values[spans(starts, lengths)] for name, column in columns.items()},
    }.items():
        batch[name] = np.full(real.shape, fill.get(name, 0), np.int32)
        batch[name][real] = values
    return batch
