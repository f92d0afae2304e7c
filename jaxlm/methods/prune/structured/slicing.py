"""Slicing of whatever sits at a leaf along a named axis, compound ones included."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxlm.core import Axes, Node, components
from jaxlm.core.paths import field_of, replace_field

Kept = Mapping[str, np.ndarray]
"""Indices that stay, by axis name. Those of `q_per_kv` may be `[kv_heads, queries]`, of each kept KV group apart."""


def cut(leaf: Any, axes: Axes, sizes: tuple[tuple[int, ...], ...] | None, kept: Kept, path: str = "") -> Any:
    """`leaf` with only the `kept` indices; inside a Node in every field that carries the axis.

    Args:
      axes: axis names of the leaf.
      sizes: sizes of the factors of its dimensions (`Network.sizes()`); without, no dimension may be compound.
      path: for messages.

    Raises:
      ValueError: for a Weight whose storage does not follow the axis (grouped or packed along it).

    >>> w = jnp.arange(12).reshape(2, 6)
    >>> cut(w, ("embed", ("heads", "dim")), ((2,), (3, 2)), {"heads": np.array([0, 2])}).tolist()
    [[0, 1, 4, 5], [6, 7, 10, 11]]
    """
    factors = {
        name: size
        for entry, sizes_of_entry in zip(axes, sizes or (), strict=bool(sizes))
        for name, size in zip(_names(entry), sizes_of_entry, strict=True)
    }
    for field, part in components(leaf, axes).items():
        array = field_of(leaf, field)
        for dimension, entry in enumerate(part.axes):
            names = _names(entry)
            if not kept.keys() & set(names):
                continue
            shape = [factors[name] if len(names) > 1 else factors.get(name, array.shape[dimension]) for name in names]
            if int(np.prod(shape)) != array.shape[dimension]:
                raise ValueError(
                    f"{path}: {type(leaf).__name__} stores {array.shape[dimension]} entries along "
                    f"{' x '.join(map(str, names))}, which are {int(np.prod(shape))}: prune before it is packed"
                )
            indices = np.arange(array.shape[dimension]).reshape(shape)
            array = _take(array, _kept_indices(indices, names, kept).reshape(-1), dimension)
        leaf = replace_field(leaf, field, array) if isinstance(leaf, Node) else array
    return leaf


def _take(array: Any, indices: Int[np.ndarray, "stays"], dimension: int) -> jax.Array:
    """On the host where there are values: a device would compile a program a shape, and ragged models have many."""
    if isinstance(array, jax.core.Tracer):
        return jnp.take(array, jnp.asarray(indices), axis=dimension)
    return jnp.asarray(np.take(np.asarray(array), indices, axis=dimension))


def _kept_indices(indices: Int[np.ndarray, "..."], names: tuple[Any, ...], kept: Kept) -> Int[np.ndarray, "..."]:
    """Of the indices into a compound dimension, one dimension a name, those that stay."""
    for axis, name in enumerate(names):
        if name not in kept:
            continue
        if kept[name].ndim == 1:
            indices = indices.take(kept[name], axis=axis)
        else:  # after the KV groups, which come first
            by_group = kept[name].reshape(*kept[name].shape, *(1,) * (indices.ndim - axis - 1))
            indices = np.take_along_axis(indices, by_group, axis=axis)
    return indices


def scale(
    leaf: Any, axes: Axes, sizes: tuple[tuple[int, ...], ...], by: Float[np.ndarray, "..."], path: str = ""
) -> Any:
    """`diag(s) W`: the rows of a kernel times factors.

    Args:
      by: factors, one dimension for each name that the input dimension is made of, 1 where they do not differ.

    Raises:
      ValueError: for codes, which cannot be scaled a row at a time.
    """
    rows = np.broadcast_to(by, sizes[0]).reshape(-1, 1)
    for field, part in components(leaf, axes).items():
        if part.axes[0] != axes[0] or part.role == "mask":
            continue
        if part.role not in ("base", "factor"):
            raise ValueError(f"{path}: half-open gates cannot be folded into the codes of a {type(leaf).__name__}")
        array = field_of(leaf, field)
        array = array * jnp.asarray(rows, array.dtype)
        leaf = replace_field(leaf, field, array) if isinstance(leaf, Node) else array
    return leaf


def _names(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)
