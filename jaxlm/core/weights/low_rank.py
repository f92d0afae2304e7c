"""LowRank: a weight plus a trained update of low rank."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.context import Context
from jaxlm.core.dropout import dropout
from jaxlm.core.matmul import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight, attend, dot, materialize, take


class LowRank(Weight):
    """`W = base + scale · a b`, run factored: `x W = x base + scale · (drop(x) a) b`.

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685.

    Attributes:
      base: array or Weight `[in, out]`, quantized in QLoRA.
      a: `[in, rank]`, b: `[rank, out]`.
      scale: `alpha / rank`. Static.
      rate: dropout rate on the input of the update. Static.
    """

    base: jax.Array | Weight
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)
    rate: float = struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self) -> jax.Array:
        update = self.scale * (self.a.astype(jnp.float32) @ self.b.astype(jnp.float32))
        return (materialize(self.base).astype(jnp.float32) + update).astype(self.dtype)

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        update = matmul(matmul(dropout(x, self.rate, ctx.at("low_rank")), self.a), self.b, dtype)
        return dot(x, self.base, ctx, dtype) + self.scale * update

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        return take(self.base, ids, ctx) + self.scale * matmul(jnp.take(self.a, ids, axis=0), self.b)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        update = matmul_transposed(matmul_transposed(x, self.b), self.a, dtype)
        return attend(x, self.base, ctx, dtype) + self.scale * update

    def components(self, axes: Axes) -> dict[str, Component]:
        return {
            "base": Component(axes, "base"),
            "a": Component((axes[0], None), "factor"),
            "b": Component((None, axes[1]), "factor"),
        }
