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
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = int(found[1]), int(found[2])
        if 0 < kept < group:
            return Pattern(text, group=group, kept=kept)
    if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, columns = int(found[1]), int(found[2])
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
    found = parse_pattern(pattern)
    if found.group:
        own = 1 - found.kept / found.group
        if sparsity not in (None, own):
            raise ValueError(
                f"{who}: the pattern {pattern} has a sparsity of {own}, not {sparsity}; leave sparsity out"
            )
        return own
    if sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"{who}: sparsity must be in [0, 1), not {sparsity}")
    return sparsity


def ranks(scores: jax.Array, axis: int = 0) -> jax.Array:
    """Place of every entry along an axis, 0 for the smallest, the first of equal entries first.

    >>> ranks(jnp.array([3.0, 1.0, 1.0])).tolist()
    [2, 0, 1]
    """
    order = jnp.argsort(scores, axis=axis, stable=True)
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis % scores.ndim)
    return jnp.put_along_axis(jnp.zeros_like(places), order, places, axis=axis, inplace=False)


def keep_largest(scores: jax.Array, sparsity: jax.Array | float) -> jax.Array:
    """The mask that drops exactly `round(sparsity · n)` entries, those with the smallest scores.

    >>> keep_largest(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 0.5).tolist()
    [[True, False], [False, True]]
    """
    flat = scores.reshape(-1)
    return (ranks(flat) >= _count(sparsity, flat.size)).reshape(scores.shape)


def keep(
    scores: jax.Array, sparsity: jax.Array | float | None, pattern: str = "unstructured", per: str = "matrix"
) -> jax.Array:
    """The mask of one matrix.

    Of its n entries (of each output's; of its blocks) `round(sparsity · n)` are dropped, those with the smallest
    scores. Under `N:M`, each group drops `round(sparsity · M)` and never more than M - N, so that a schedule that grows
    to `1 - N/M` empties the groups one entry after the other.

    >>> keep(jnp.array([[1.0], [4.0], [3.0], [2.0]]), None, "1:4")[:, 0].tolist()
    [False, True, False, False]

    Args:
      scores: `[in, out]`, larger is more important; any real dtype.
      sparsity: share of zeros, a number or an array; `None` (only under `N:M`): `1 - N/M`.
      pattern: `unstructured`, `N:M` or `block:RxC`.
      per: `matrix`, or `output`: each column (each column of blocks) drops its own share. `N:M` is the same in both.

    Returns:
      bool `[in, out]`.

    Raises:
      ValueError: for a pattern or `per` that does not exist, or one that does not divide the matrix.
    """
    units = arrange(scores, pattern, per)
    if sparsity is None and not parse_pattern(pattern).group:
        raise ValueError(f"the pattern {pattern} needs a sparsity")
    mask = ranks(units) >= dropped(sparsity, units.shape[0], pattern)
    return restore(mask, scores.shape, pattern, per)


def keep_together(
    scores: Mapping[str, jax.Array], sparsity: jax.Array | float, pattern: str = "unstructured"
) -> dict[str, jax.Array]:
    """The masks of several matrices that share one budget: the smallest scores of all go, wherever they are.

    Under a block pattern `round(sparsity · number of blocks)` blocks go. Scores of different matrices are compared as
    they are.

    Args:
      scores: by name, `[in, out]` or stacked `[layers, in, out]`.
      sparsity: share of zeros over all of them.
      pattern: `unstructured` or `block:RxC`; under `N:M` every group has its own budget, so it is refused.
    """
    found = parse_pattern(pattern)
    if found.group:
        raise ValueError(
            f"the pattern {pattern} fixes the share of every group; a budget over all matrices needs another"
        )
    blocks = {name: _blocks(s, found) for name, s in scores.items()}
    flat = keep_largest(jnp.concatenate([b.reshape(-1) for b in blocks.values()]), sparsity)
    masks, start = {}, 0
    for name, b in blocks.items():
        masks[name] = _whole(flat[start : start + b.size].reshape(b.shape), found)
        start += b.size
    return masks


def check_shape(shape: tuple[int, ...], pattern: str, name: str) -> None:
    """Raises ValueError, naming the parameter, when a pattern does not divide a matrix `[in, out]`."""
    found = parse_pattern(pattern)
    for what, size, unit in (("inputs", shape[-2], found.group or found.rows), ("outputs", shape[-1], found.columns)):
        if size % unit:
            raise ValueError(
                f"{name}: its {size} {what} are not a multiple of {unit}, as the pattern {pattern} needs; leave it out "
                "of targets, or take another pattern"
            )


def arrange(scores: jax.Array, pattern: str, per: str = "matrix") -> jax.Array:
    """The matrix as `[n, columns]`: what competes for a place, n blocks, entries or members of a group, in a column."""
    found = parse_pattern(pattern)
    if per not in ("matrix", "output"):
        raise ValueError(f"per must be 'matrix' or 'output', not {per!r}")
    if found.group:
        check_shape(scores.shape, pattern, "the matrix")
        groups = scores.reshape(-1, found.group, scores.shape[-1])
        return jnp.moveaxis(groups, 1, 0).reshape(found.group, -1)
    blocks = _blocks(scores, found)
    return blocks if per == "output" else blocks.reshape(-1, 1)


def restore(mask: jax.Array, shape: tuple[int, ...], pattern: str, per: str = "matrix") -> jax.Array:
    """The inverse of `arrange`: a mask of a matrix of that shape."""
    found = parse_pattern(pattern)
    if found.group:
        return jnp.moveaxis(mask.reshape(found.group, -1, shape[-1]), 0, 1).reshape(shape)
    return _whole(mask.reshape(shape[0] // found.rows, shape[1] // found.columns), found)


def dropped(sparsity: jax.Array | float | None, size: int, pattern: str) -> jax.Array:
    """How many of `size` go: `round(sparsity · size)`, under `N:M` at most M - N."""
    found = parse_pattern(pattern)
    if not found.group:
        return _count(0.0 if sparsity is None else sparsity, size)
    most = found.group - found.kept
    return jnp.int32(most) if sparsity is None else jnp.minimum(_count(sparsity, size), most)


def _count(sparsity: jax.Array | float, size: int) -> jax.Array:
    return jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)


def _blocks(scores: jax.Array, pattern: Pattern) -> jax.Array:
    """Sum of the scores of every block: `[..., in / R, out / C]`."""
    if pattern.rows * pattern.columns == 1:
        return scores
    check_shape(scores.shape, pattern.name, "the matrix")
    *lead, rows, columns = scores.shape
    cut = scores.reshape(*lead, rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)
    return cut.sum(axis=(-3, -1))


def _whole(mask: jax.Array, pattern: Pattern) -> jax.Array:
    """The inverse of `_blocks` for masks."""
    if pattern.rows * pattern.columns == 1:
        return mask
    return jnp.repeat(jnp.repeat(mask, pattern.rows, axis=-2), pattern.columns, axis=-1)
