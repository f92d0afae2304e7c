"""Parameter declarations: shape, axis names and initial distribution, in one place."""

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from jaxlm.core.paths import flatten, map_leaves
from jaxlm.core.weight import Axes


class Dim(NamedTuple):
    """One dimension of an array: its axis name (or names, for a compound one) and its sizes."""

    names: tuple[str | None, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @property
    def name(self) -> Any:
        return self.names[0] if len(self.names) == 1 else self.names


def dim(**names: int) -> Dim:
    """`dim(embed=768)`, or compound, slowest first: `dim(heads=12, head_dim=64)`.

    >>> dim(heads=12, head_dim=64).size
    768
    """
    return Dim(tuple(names), tuple(names.values()))


class Parameter(NamedTuple):
    """An array to be: `std` is that of a centred normal; `None` fills with `constant`."""

    dims: tuple[Dim, ...]
    std: float | None = None
    constant: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)

    @property
    def axes(self) -> Axes:
        return tuple(d.name for d in self.dims)

    def create(self, key: Key[Array, ""]) -> Float32[Array, "*shape"]:
        """The initial value."""
        if self.std is None:
            return jnp.full(self.shape, self.constant, jnp.float32)
        return self.std * jax.random.normal(key, self.shape, jnp.float32)


Spec = Mapping[str, Any]
"""Nested dict of Parameters: everything a network of a given config consists of."""


def initialize(key: Key[Array, ""], spec: Spec) -> dict[str, Any]:
    """Initial arrays, each from a key of its own (folded from its path), so that they do not depend on their order."""
    return map_leaves(lambda path, p: p.create(jax.random.fold_in(key, zlib.crc32(path.encode()))), spec)


def abstract(spec: Spec, dtype: Any = jnp.float32) -> dict[str, Any]:
    """ShapeDtypeStructs: the tree without its memory."""
    return map_leaves(lambda path, p: jax.ShapeDtypeStruct(p.shape, dtype), spec)


def axis_names(spec: Spec) -> dict[str, Axes]:
    """Axis names by path."""
    return {path: p.axes for path, p in flatten(spec).items()}


def axis_sizes(spec: Spec) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Sizes of the factors of every dimension by path: what slicing along a compound axis needs."""
    return {path: tuple(d.sizes for d in p.dims) for path, p in flatten(spec).items()}
