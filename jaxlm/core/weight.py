"""The Weight socket: what may sit at a `kernel` or `embedding` leaf.

A leaf is a plain array or a `Weight`: a pytree that behaves like a matrix `W [in, out]`, whatever it stores.
Models never look inside: they call `dot`, `take` and `attend` below, which treat both alike.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.core.context import Context
from jaxlm.core.matmul import matmul, matmul_transposed

Axes = tuple[Any, ...]
"""Axis names of one array: a name, `None`, or a tuple of names (a compound axis) for each dimension."""


class Component(NamedTuple):
    """How one field of a Weight is sharded, decayed, trained and saved.

    Attributes:
      axes: axis names of the field.
      role: `base` (an ordinary parameter), `factor` (a low-rank or added part), `scale`, `mask`, `codes` or `buffer`.
    """

    axes: Axes
    role: str


class Node(struct.PyTreeNode):
    """A pytree with named parts that sits in a parameter tree: a Weight or a Site."""

    def components(self, axes: Axes) -> dict[str, Component]:
        """Axis names and role of every array field, from the axis names of what the node stands for."""
        raise NotImplementedError


class Weight(Node):
    """A matrix `W [in, out]`; subclasses give `materialize`, `components`, `shape`, and override what they do faster.

    Under `scan` the same class carries a leading `layers` axis on every field; methods always see it without.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that the weight stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the materialized matrix."""
        raise NotImplementedError

    def materialize(self) -> Float[Array, "*layers in out"]:
        """The dense matrix, or one a layer of a stack."""
        raise NotImplementedError

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        """`x @ W` in `dtype`, by default that of `x`."""
        return matmul(x, self.materialize(), dtype)

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        """Rows `W[ids]`."""
        return jnp.take(self.materialize(), ids, axis=0)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        """`x @ Wᵀ` in `dtype`, by default that of `x`: the transposed use by a tied head."""
        return matmul_transposed(x, self.materialize(), dtype)


class Wrapper(Weight):
    """A Weight around another, of its shape and dtype.

    Attributes:
      base: an array, or a Weight again.
    """

    base: Float[Array, "*layers in out"] | Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype


def dot(
    x: Float[Array, "*batch in"],
    w: Float[Array, "in out"] | Weight,
    ctx: Context = Context(),
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """`x @ w` in `dtype`, by default that of `x`.

    Operands have the dtype of `x` whatever `dtype` is: with bfloat16 activations, float32 is the accumulator before it
    is rounded.

    >>> dot(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[4.0, 6.0]]
    """
    return w.dot(x, ctx, dtype) if isinstance(w, Weight) else matmul(x, w, dtype)


def take(
    w: Float[Array, "in out"] | Weight, ids: Int[Array, "*batch"], ctx: Context = Context()
) -> Float[Array, "*batch out"]:
    """Rows `w[ids]` of an embedding table."""
    return w.take(ids, ctx) if isinstance(w, Weight) else jnp.take(w, ids, axis=0)


def attend(
    x: Float[Array, "*batch out"],
    w: Float[Array, "in out"] | Weight,
    ctx: Context = Context(),
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch in"]:
    """`x @ wᵀ`, in `dtype` as `dot`: logits from a tied embedding."""
    return w.attend(x, ctx, dtype) if isinstance(w, Weight) else matmul_transposed(x, w, dtype)


def materialize(w: Float[Array, "*shape"] | Weight) -> Float[Array, "..."]:
    """The dense matrix of a Weight; an array, of any shape, is returned as it is."""
    return w.materialize() if isinstance(w, Weight) else w


def components(leaf: Any, axes: Axes) -> dict[str, Component]:
    """Every array below a leaf: `{dotted field path: component}`; a plain array is `{"": (axes, "base")}`.

    A nested Weight contributes its own parts under the name of the field that holds it: `base.codes`.
    """
    if not isinstance(leaf, Node):
        return {"": Component(axes, "base")}
    parts: dict[str, Component] = {}
    for field, part in leaf.components(axes).items():
        inner = getattr(leaf, field)
        if isinstance(inner, Node):
            parts |= {f"{field}.{name}": c for name, c in components(inner, part.axes).items()}
        else:
            parts[field] = part
    return parts
