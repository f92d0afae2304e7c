"""Factored: a weight as the product of two narrow ones."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Weight, attend, dot, materialize, take


class Factored(Weight):
    """`W = a b` with rank r, run as `(x a) b`: `r (in + out)` products instead of `in · out`.

    Both factors train, and each may be a Weight itself (rounded, say).

    Attributes:
      a: array or Weight `[in, r]`.
      b: array or Weight `[r, out]`.
    """

    a: jax.Array | Weight
    b: jax.Array | Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def dtype(self):
        return self.a.dtype

    def materialize(self) -> jax.Array:
        product = materialize(self.a).astype(jnp.float32) @ materialize(self.b).astype(jnp.float32)
        return product.astype(self.dtype)

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return dot(dot(x, self.a, ctx), self.b, ctx, dtype)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        return dot(take(self.a, ids, ctx), self.b, ctx)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return attend(attend(x, self.b, ctx), self.a, ctx, dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"a": Component((axes[0], None), "factor"), "b": Component((None, axes[1]), "factor")}
