"""The Weight socket: what may sit at a `kernel` or `embedding` leaf.

A leaf is a plain array or a `Weight`: a pytree that behaves like a matrix `W` of shape `[in, out]`, whatever it stores.
Models never look inside: they call `dot`, `take` and `attend` below, which treat both alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

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
        """Axis names and role of every array field, given the axis names of what the node stands for."""
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
    def dtype(self) -> Any:
        """Dtype of the materialized matrix."""
        raise NotImplementedError

    def materialize(self) -> jax.Array:
        """The dense matrix `[in, out]`."""
        raise NotImplementedError

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        """`x @ W` for `x [..., in]`, in `dtype`, which is that of `x` if not given."""
        return matmul(x, self.materialize(), dtype)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """Rows `W[ids]`: `[..., out]`."""
        return jnp.take(self.materialize(), ids, axis=0)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        """`x @ Wᵀ` for `x [..., out]`, in `dtype` (or that of `x`): the transposed use by a tied head."""
        return matmul_transposed(x, self.materialize(), dtype)


def dot(x: jax.Array, w: jax.Array | Weight, ctx: Context = Context(), dtype: Any = None) -> jax.Array:
    """`x @ w` for an array or a Weight, in `dtype`, which is that of `x` if not given.

    Operands have the dtype of `x` in any case: with bfloat16 activations, float32 is what the products add up to before
    it is rounded.

    >>> dot(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[4.0, 6.0]]
    """
    return w.dot(x, ctx, dtype) if isinstance(w, Weight) else matmul(x, w, dtype)


def take(w: jax.Array | Weight, ids: jax.Array, ctx: Context = Context()) -> jax.Array:
    """Rows `w[ids]` of an embedding table."""
    return w.take(ids, ctx) if isinstance(w, Weight) else jnp.take(w, ids, axis=0)


def attend(x: jax.Array, w: jax.Array | Weight, ctx: Context = Context(), dtype: Any = None) -> jax.Array:
    """`x @ wᵀ`, in `dtype` as `dot`: logits from a tied embedding."""
    return w.attend(x, ctx, dtype) if isinstance(w, Weight) else matmul_transposed(x, w, dtype)


def materialize(w: jax.Array | Weight) -> jax.Array:
    """The dense matrix behind an array or a Weight."""
    return w.materialize() if isinstance(w, Weight) else w


def components(leaf: Any, axes: Axes) -> dict[str, Component]:
    """Every array below a leaf: `{dotted field path: component}`; a plain array is `{"": (axes, "base")}`.

    A nested Weight contributes its own parts under the name of the field that holds it: `base.codes`.
    """
    if not isinstance(leaf, Node):
        return {"": Component(axes, "base")}
    found: dict[str, Component] = {}
    for field, part in leaf.components(axes).items():
        inner = getattr(leaf, field)
        if isinstance(inner, Node):
            found |= {f"{field}.{name}": c for name, c in components(inner, part.axes).items()}
        else:
            found[field] = part
    return found
