"""The batch socket: ``batch(step)`` as a pure function of (seed, step).

No state is kept from one step to the next: a run resumes at any step, and every host of a pod makes the same global
batch. A batch transform is a function Batches -> Batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxlm.data.packing import IGNORED, Batch, Joined, best_fit, cut, join, lay_out
from jaxlm.data.ragged import Examples, Ragged

Remainder = Literal["pad", "drop"]


@dataclass(frozen=True)
class Batches:
    """``batches(step)`` for step = 0, 1, ..; epoch after epoch without end.

    Attributes:
      make: step -> batch, pure.
      steps_per_epoch: number of steps in which every row occurs once.
      kinds: number of distinct shapes. ``make(-1)`` to ``make(-kinds)`` give one batch of each, of filler rows only.
    """

    make: Callable[[int], Batch]
    steps_per_epoch: int
    kinds: int = 1

    def __call__(self, step: int) -> Batch:
        return self.make(step)

    def map(self, transform: Callable[[Batch, int], Batch]) -> "Batches":
        """Applies ``transform(batch, step)``, which must be pure and keep the number of distinct shapes."""
        return dataclasses.replace(self, make=lambda step: transform(self.make(step), step))


def steps_per_epoch(rows: int, batch_size: int, remainder: Remainder = "pad") -> int:
    """Batches in an epoch: a last, incomplete batch is filled up with filler rows ("pad") or left out ("drop")."""
    if remainder not in ("pad", "drop"):
        raise ValueError(f"unknown remainder={remainder!r}: 'pad' or 'drop'")
    steps = -(-rows // batch_size) if remainder == "pad" else rows // batch_size
    if steps == 0:
        raise ValueError(f"{rows} rows make no batch of {batch_size}" + (", use remainder='pad'" if rows else ""))
    return steps


def with_decoder_start(batches: Batches, start_id: int | None) -> Batches:
    """The batches with ``start_id`` as the first token of ``decoder_input_ids``, if they have that column.

    It is the token that the model generates from; encoded targets begin with the padding token, as T5's do.
    """
    if start_id is None or "decoder_input_ids" not in batches(-1):
        return batches

    def start(batch: Batch, step: int) -> Batch:
        ids = batch["decoder_input_ids"].copy()
        ids[..., 0] = start_id
        return batch | {"decoder_input_ids": ids}

    return batches.map(start)


def generator(*key: int) -> np.random.Generator:
    """A generator that is a pure function of its key, for example (seed, step); draws of two keys are independent."""
    # Words of fixed width after their count, since SeedSequence does not tell [7] from [7, 0].
    words = np.array([len(key), *(k % 2**64 for k in key)], np.uint64).view(np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words.tolist())))


FINEST = 1024
"""Most distinct lengths that ``fitted`` considers, so that long texts do not make it slow."""

TILE = 8
"""Lengths are multiples of this: a fraction of a tensor core's or TPU's tile would be wasted."""


def fitted(sizes: np.ndarray, buckets: int, max_length: int) -> tuple[int, ...]:
    """The bucket lengths, at most ``buckets``, with the least padding for examples of these sizes; the last fits all.

    Lengths are multiples of 8, or ``max_length``. With candidate lengths s_1 < .. < s_n, where c_j examples fit s_j,
    the fewest positions that k buckets need for those examples are
    ``P[k, j] = min over i <= j of P[k - 1, i] + s_j (c_j - c_i)``.

    >>> fitted(np.array([3, 7, 8, 18, 20, 61]), 3, max_length=64)
    (8, 24, 64)
    """
    # Candidates s and cumulative counts c.
    step = TILE * -(-max(int(sizes.max(initial=1)), 1) // (TILE * FINEST))
    rounded = np.clip(-(-sizes.astype(np.int64) // step) * step, min(TILE, max_length), max_length)
    lengths, counts = np.unique(rounded, return_counts=True) if len(sizes) else (np.array([max_length]), np.array([0]))
    cumulative = np.cumsum(counts)
    # P of one bucket; then of one more in every round, with the i at which the minimum is attained.
    positions = lengths * cumulative
    upper = np.tri(len(lengths), dtype=bool).T
    last_bucket = np.where(upper, lengths * (cumulative - cumulative[:, None]), 1 << 60)
    previous = []
    for _ in range(min(buckets, len(lengths)) - 1):
        total = positions[:, None] + last_bucket
        previous.append(total.argmin(axis=0))
        positions = total.min(axis=0)
    # Trace the minimum back.
    chosen = [len(lengths) - 1]
    for argmin in reversed(previous):
        chosen.append(int(argmin[chosen[-1]]))
    return tuple(sorted({int(lengths[i]) for i in chosen}))


# -- padded rows ----------------------------------------------------------------------------------------------------


class _Buckets(NamedTuple):
    """Static lengths: ``inputs[i]`` with ``targets[i]`` on the decoder's side (None without a decoder)."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None


def _buckets(examples: Examples, lengths: Sequence[int]) -> _Buckets:
    """The buckets that occur. The decoder's length is a function of the input's bucket (the longest target among the
    inputs that fit it, in whole tiles), so that a decoder does not multiply the number of shapes."""
    edges, sizes = np.unique(np.asarray(lengths, np.int64)), examples.lengths
    if len(sizes) and sizes.max() > edges[-1]:
        raise ValueError(
            f"example {sizes.argmax()} has {sizes.max()} tokens, more than the longest bucket, {edges[-1]}"
        )
    used = np.unique(np.searchsorted(edges, sizes))
    inputs = tuple(edges[used].tolist())
    if examples.decoder_lengths is None:
        return _Buckets(inputs, None)
    longest = [int(examples.decoder_lengths[sizes <= edge].max()) for edge in inputs]
    return _Buckets(inputs, tuple(-(-max(length, 1) // TILE) * TILE for length in longest))


def assemble(examples: Examples, rows: np.ndarray, length: int, target: int | None, pad_id: int) -> Batch:
    """Right-padded rows; row -1 is filler: ``labels`` IGNORED (NaN for float labels), attention on one padding token.

    Ragged columns are int32 [B, width], of examples that are groups of texts [B, group, width]; an empty text attends
    to one padding token as filler does.

    Args:
      rows: int [B], numbers of examples.
      length: of the input columns; target: of the decoder columns.
    """
    batch: Batch = {}
    texts, shape = rows, rows.shape
    if examples.group > 1:
        shape = (len(rows), examples.group)
        texts = np.where(rows[:, None] >= 0, rows[:, None] * examples.group + np.arange(examples.group), -1).ravel()
    for name, column in examples.columns.items():
        decoder = examples.on_decoder(name)
        fill = pad_id if name.endswith("input_ids") else IGNORED if name.endswith("labels") else -(name == "row")
        if isinstance(column, Ragged):
            width = target if decoder else length
            assert width is not None
            batch[name] = column.padded(texts, width, fill).reshape(*shape, width)
            if name.endswith("input_ids"):
                sizes = np.where(texts >= 0, column.spans_of(texts)[1], 0)
                mask = (np.arange(width) < np.maximum(sizes, 1)[:, None]).astype(np.int32)
                batch["decoder_attention_mask" if decoder else "attention_mask"] = mask.reshape(*shape, width)
        else:
            filler = np.nan if np.issubdtype(column.dtype, np.floating) else fill
            real = (rows >= 0).reshape(len(rows), *(1,) * (column.ndim - 1))
            batch[name] = np.where(real, column[rows], np.asarray(filler, column.dtype))
    return batch


def _padded(
    examples: Examples,
    lengths: Sequence[int],
    pad_id: int,
    batch_size: int,
    plan: Callable[[int], np.ndarray],
    steps: int,
) -> Callable[[int], Batch]:
    """`step -> batch` of the examples that ``plan(epoch)``, int [steps, batch_size], names, in the smallest bucket."""
    buckets = _buckets(examples, lengths)
    sizes = examples.lengths

    def make(step: int) -> Batch:
        if step < 0:
            kind, rows = -1 - step, np.full(batch_size, -1)
        else:
            rows = plan(step // steps)[step % steps]
            kind = int(np.searchsorted(buckets.inputs, sizes[rows[rows >= 0]].max(initial=0)))
        target = buckets.targets[kind] if buckets.targets else None
        return assemble(examples, rows, buckets.inputs[kind], target, pad_id)

    return make


def bucketed(
    examples: Examples,
    batch_size: int,
    seed: int,
    *,
    lengths: Sequence[int],
    pad_id: int = 0,
    remainder: Remainder = "pad",
    window: int = 50,
) -> Batches:
    """Training batches of examples of similar length, each padded to the smallest bucket that holds it.

    As transformers' ``group_by_length``: a permutation of the examples every epoch, sorted by length inside windows of
    ``window`` batches; then the batches are shuffled.

    Args:
      lengths: bucket lengths, see ``fitted``; each that occurs is one compiled shape.
      remainder: of the last ``n % batch_size`` rows of an epoch: "pad" adds filler rows, "drop" leaves them out.
    """
    n, sizes = len(examples), examples.lengths
    steps = steps_per_epoch(n, batch_size, remainder)

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> np.ndarray:
        random = generator(seed, epoch)
        order = random.permutation(n)[: steps * batch_size]
        group = np.arange(len(order)) // (window * batch_size)
        order = order[np.lexsort((-sizes[order], group))]
        return random.permutation(_in_batches(order, batch_size))

    make = _padded(examples, lengths, pad_id, batch_size, plan, steps)
    return Batches(make, steps, len(_buckets(examples, lengths).inputs))


def in_order(examples: Examples, batch_size: int, *, lengths: Sequence[int], pad_id: int = 0) -> Batches:
    """Evaluation batches: every example exactly once in ``steps_per_epoch`` steps, sorted by length.

    Adds ``row`` int32 [B], the number of the example in ``examples``, -1 for filler rows.
    """
    order = np.argsort(examples.lengths, kind="stable")
    row = np.arange(len(examples), dtype=np.int32)
    numbered = dataclasses.replace(examples, columns={**examples.columns, "row": row})
    steps = steps_per_epoch(len(examples), batch_size)
    rows = _in_batches(order, batch_size)
    make = _padded(numbered, lengths, pad_id, batch_size, lambda epoch: rows, steps)
    return Batches(make, steps, len(_buckets(examples, lengths).inputs))


def _in_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    """int [batches, batch_size], the last filled with -1."""
    return np.pad(order, (0, -len(order) % batch_size), constant_values=-1).reshape(-1, batch_size)


# -- packed rows ----------------------------------------------------------------------------------------------------


def packed(
    documents: Ragged,
    batch_size: int,
    seed: int | None,
    *,
    length: int,
    pad_id: int = 0,
    remainder: Remainder = "pad",
    sizes: Ragged | None = None,
) -> Batches:
    """Pre-training batches: documents joined and cut in rows of ``length``, with the columns of ``packing.cut``.

    Every epoch permutes the documents, cuts them at other tokens and permutes the rows. With ``seed=None`` (evaluation)
    documents and rows are in order. Every token is in exactly one row of an epoch (except in a dropped remainder).

    Args:
      sizes: the bytes of text of every token, for batches with a column ``bytes``.
    """
    steps = steps_per_epoch(-(-len(documents.values) // length), batch_size, remainder)
    filled = np.flatnonzero(documents.lengths)

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> tuple[Joined, np.ndarray]:
        if seed is None:
            joined = join(documents, length)
            return joined, _in_batches(np.arange(joined.rows), batch_size)
        random = generator(seed, epoch)
        order = random.permutation(filled)
        shift = int(random.integers(length)) if documents.lengths[order[0]] > length else 0
        joined = join(documents, length, order, shift)
        return joined, _in_batches(random.permutation(joined.rows)[: steps * batch_size], batch_size)

    def make(step: int) -> Batch:
        joined, rows = plan(max(step, 0) // steps)
        chosen = rows[step % steps] if step >= 0 else np.full(batch_size, -1)
        return _with_attended_token(cut(joined, chosen, pad_id, None if sizes is None else sizes.values))

    return Batches(make, steps)


def packed_examples(
    examples: Examples,
    batch_size: int,
    seed: int,
    *,
    length: int,
    pad_id: int = 0,
    remainder: Remainder = "pad",
) -> Batches:
    """Whole examples packed in rows of ``length`` by best fit; for tasks with one label per token.

    Every epoch permutes the examples of equal length, so that each has other neighbours (the lengths that share a row,
    and so the number of rows, stay the same), and permutes the rows.
    """
    columns = {
        name: c for name, c in examples.columns.items() if isinstance(c, Ragged) and not examples.on_decoder(name)
    }
    if len(columns) < len(examples.columns):
        raise ValueError(
            f"only columns with one value per token can be packed, not {sorted(examples.columns - columns.keys())}"
        )
    if examples.group > 1:
        raise ValueError(f"groups of {examples.group} texts cannot be packed; set config.data.pack = False")
    # The packing of lengths, which is the same in every epoch: numbers in it are ranks by length.
    sizes = examples.lengths
    fill = {"input_ids": pad_id, "labels": IGNORED}
    slots = best_fit(np.sort(sizes), length)
    steps = steps_per_epoch(len(slots), batch_size, remainder)

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> tuple[Ragged, np.ndarray]:
        random = generator(seed, epoch)
        order = random.permutation(len(examples))
        order = order[np.argsort(sizes[order], kind="stable")]
        rows = random.permutation(len(slots))[: steps * batch_size]
        return Ragged(order[slots.values], slots.offsets), _in_batches(rows, batch_size)

    def make(step: int) -> Batch:
        packing, rows = plan(max(step, 0) // steps)
        chosen = rows[step % steps] if step >= 0 else np.full(batch_size, -1)
        return _with_attended_token(lay_out(columns, packing, chosen, length, fill))

    return Batches(make, steps)


def _with_attended_token(batch: Batch) -> Batch:
    """Gives empty rows a segment of one padding token, since a softmax over nothing is NaN."""
    segments = batch["segment_ids"].copy()
    segments[:, 0] = np.maximum(segments[:, 0], 1)
    return batch | {"segment_ids": segments}
