"""Which entries of a matrix stay: exact counts under a pattern.

A matrix is `[in, out]`, a score of every entry says how much it matters, and the mask is true where the entry stays.
Patterns:

- `unstructured`: any entries.
- `N:M`: in every group of M entries along the input axis, N stay (`2:4` keeps two of four, `1:4` one).
- `block:RxC`: whole blocks of R inputs and C outputs, by the sum of their scores.

Entries are counted and not compared with a threshold, so the number is exact where scores are equal: of equal entries
the first go, in the order of the matrix.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, Real

Share = float | Real[Array, ""]
"""Of the entries that go: a number, or a traced one."""
PER = ("output", "matrix", "model")
"""What a share is counted over: each output (a column) apart, a matrix, or all matrices together."""


class Pattern(NamedTuple):
    """What is kept or dropped together.

    Attributes:
      name: as it was written.
      group: M of `N:M`, 0 otherwise; kept: N.
      rows, columns: of a block; 1 and 1 otherwise.
    """

    name: str
    group: int = 0
    kept: int = 0
    rows: int = 1
    columns: int = 1


def parse_pattern(text: str) -> Pattern:
    """The Pattern behind `unstructured`, `N:M` or `block:RxC`.

    >>> parse_pattern("2:4").group, parse_pattern("block:4x1").rows
    (4, 4)
    """
    if text == "unstructured":
        return Pattern(text)
    if n_of_m := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = int(n_of_m[1]), int(n_of_m[2])
        if 0 < kept < group:
            return Pattern(text, group=group, kept=kept)
    if block := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, columns = int(block[1]), int(block[2])
        if rows * columns > 0:
            return Pattern(text, rows=rows, columns=columns)
    raise ValueError(
        f"unknown sparsity pattern {text!r}; known: unstructured, N:M with 0 < N < M (N kept of M inputs, 2:4), and "
        "block:RxC (R inputs, C outputs)"
    )


def final_sparsity(sparsity: float | None, pattern: str, who: str) -> float:
    """The share of zeros that is asked for, checked; `N:M` has `1 - N/M`, which need not be repeated.

    >>> final_sparsity(None, "1:4", "magnitude")
    0.75
    """
    parsed = parse_pattern(pattern)
    if parsed.group:
        fixed = 1 - parsed.kept / parsed.group
        if sparsity not in (None, fixed):
            raise ValueError(
                f"{who}: the pattern {pattern} has a sparsity of {fixed}, not {sparsity}; leave sparsity out"
            )
        return fixed
    if sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"{who}: sparsity must be in [0, 1), not {sparsity}")
    return sparsity


def ranks(scores: Real[Array, "*shape"], axis: int = 0) -> Int32[Array, "*shape"]:
    """Rank of every entry along an axis, 0 for the smallest, the first of equal entries first.

    >>> ranks(jnp.array([3.0, 1.0, 1.0])).tolist()
    [2, 0, 1]
    """
    order = jnp.argsort(scores, axis=axis, stable=True)
    counting = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis % scores.ndim)
    return jnp.put_along_axis(jnp.zeros_like(counting), order, counting, axis=axis, inplace=False)


def keep_largest(scores: Real[Array, "*shape"], sparsity: Share) -> Bool[Array, "*shape"]:
    """The mask that drops exactly `round(sparsity · n)` entries, those with the smallest scores.

    >>> keep_largest(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 0.5).tolist()
    [[True, False], [False, True]]
    """
    flat = scores.reshape(-1)
    return (ranks(flat) >= _count(sparsity, flat.size)).reshape(scores.shape)


def keep(
    scores: Real[Array, "in out"], sparsity: Share | None, pattern: str = "unstructured", per: str = "matrix"
) -> Bool[Array, "in out"]:
    """The mask of one matrix.

    Of its n entries (of each output's; of its blocks) `round(sparsity · n)` are dropped, those with the smallest
    scores. Under `N:M`, each group drops `round(sparsity · M)` and never more than M - N, so that a schedule that grows
    to `1 - N/M` empties the groups one entry after the other.

    >>> keep(jnp.array([[1.0], [4.0], [3.0], [2.0]]), None, "1:4")[:, 0].tolist()
    [False, True, False, False]

    Args:
      scores: larger is more important.
      sparsity: share of zeros; `None` (only under `N:M`): `1 - N/M`.
      pattern: `unstructured`, `N:M` or `block:RxC`.
      per: `matrix`, or `output`: each column (each column of blocks) drops its own share. `N:M` is the same in both.

    Raises:
      ValueError: for a pattern or `per` that does not exist, or one that does not divide the matrix.
    """
    units = arrange(scores, pattern, per)
    if sparsity is None and not parse_pattern(pattern).group:
        raise ValueError(f"the pattern {pattern} needs a sparsity")
    mask = ranks(units) >= dropped(sparsity, units.shape[0], pattern)
    return restore(mask, scores.shape, pattern)


def keep_together(
    scores: Mapping[str, Real[Array, "*_ _ _"]], sparsity: Share, pattern: str = "unstructured"
) -> dict[str, Bool[Array, "*_ _ _"]]:
    """The masks of several matrices that share one budget: the smallest scores of all go, wherever they are.

    Under a block pattern `round(sparsity · number of blocks)` blocks go. Scores of different matrices are compared as
    they are.

    Args:
      scores: by name, `[in, out]` or stacked `[layers, in, out]`.
      sparsity: share of zeros over all of them.
      pattern: `unstructured` or `block:RxC`; under `N:M` every group has its own budget, so it is refused.
    """
    parsed = parse_pattern(pattern)
    if parsed.group:
        raise ValueError(
            f"the pattern {pattern} fixes the share of every group; a budget over all matrices needs another"
        )
    blocks = {name: _block_sums(s, parsed) for name, s in scores.items()}
    flat = keep_largest(jnp.concatenate([b.reshape(-1) for b in blocks.values()]), sparsity)
    masks, start = {}, 0
    for name, b in blocks.items():
        masks[name] = _entry_mask(flat[start : start + b.size].reshape(b.shape), parsed)
        start += b.size
    return masks


def check_shape(shape: tuple[int, ...], pattern: str, name: str) -> None:
    """Raises ValueError, naming the parameter, when a pattern does not divide a matrix `[in, out]`."""
    parsed = parse_pattern(pattern)
    row_unit, column_unit = parsed.group or parsed.rows, parsed.columns
    for what, size, unit in (("inputs", shape[-2], row_unit), ("outputs", shape[-1], column_unit)):
        if size % unit:
            raise ValueError(
                f"{name}: its {size} {what} are not a multiple of {unit}, as the pattern {pattern} needs; leave it out "
                "of targets, or take another pattern"
            )


def arrange(scores: Real[Array, "in out"], pattern: str, per: str = "matrix") -> Real[Array, "n columns"]:
    """The matrix with what competes in one column: n blocks, entries or members of a group."""
    parsed = parse_pattern(pattern)
    if per not in ("matrix", "output"):
        raise ValueError(f"per must be 'matrix' or 'output', not {per!r}")
    if parsed.group:
        check_shape(scores.shape, pattern, "the matrix")
        groups = scores.reshape(-1, parsed.group, scores.shape[-1])
        return jnp.moveaxis(groups, 1, 0).reshape(parsed.group, -1)
    blocks = _block_sums(scores, parsed)
    return blocks if per == "output" else blocks.reshape(-1, 1)


def restore(mask: Bool[Array, "n columns"], shape: tuple[int, ...], pattern: str) -> Bool[Array, "in out"]:
    """The inverse of `arrange`: a mask of a matrix of that shape."""
    parsed = parse_pattern(pattern)
    if parsed.group:
        return jnp.moveaxis(mask.reshape(parsed.group, -1, shape[-1]), 0, 1).reshape(shape)
    return _entry_mask(mask.reshape(shape[0] // parsed.rows, shape[1] // parsed.columns), parsed)


def dropped(sparsity: Share | None, size: int, pattern: str) -> Int[Array, ""]:
    """How many of `size` go: `round(sparsity · size)`, under `N:M` at most M - N."""
    parsed = parse_pattern(pattern)
    if not parsed.group:
        return _count(0.0 if sparsity is None else sparsity, size)
    most = parsed.group - parsed.kept
    return jnp.int32(most) if sparsity is None else jnp.minimum(_count(sparsity, size), most)


def _count(sparsity: Share, size: int) -> Int32[Array, ""]:
    return jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)


def _block_sums(scores: Real[Array, "*layers in out"], pattern: Pattern) -> Real[Array, "*layers _ _"]:
    """Sum of the scores of every block: `[..., in / R, out / C]`."""
    if pattern.rows * pattern.columns == 1:
        return scores
    check_shape(scores.shape, pattern.name, "the matrix")
    *lead, rows, columns = scores.shape
    cut = scores.reshape(*lead, rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)
    return cut.sum(axis=(-3, -1))


def _entry_mask(mask: Bool[Array, "*layers _ _"], pattern: Pattern) -> Bool[Array, "*layers in out"]:
    """The mask of entries from one of blocks."""
    if pattern.rows * pattern.columns == 1:
        return mask
    return jnp.repeat(jnp.repeat(mask, pattern.rows, axis=-2), pattern.columns, axis=-1)
