"""LowRank: a weight plus a trained update of low rank."""

import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.core import (
    Axes,
    Component,
    Context,
    Wrapper,
    attend,
    dot,
    dropout,
    materialize,
    matmul,
    matmul_transposed,
    take,
)


class LowRank(Wrapper):
    """`W = base + scale · a b`, run factored: `x W = x base + scale · (drop(x) a) b`.

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685.

    Attributes:
      base: quantized in QLoRA.
      a, b: the factors of the update.
      scale: `alpha / rank`. Static.
      rate: dropout rate on the input of the update. Static.
    """

    a: Float[Array, "*layers in rank"]
    b: Float[Array, "*layers rank out"]
    scale: float = struct.field(pytree_node=False, default=1.0)
    rate: float = struct.field(pytree_node=False, default=0.0)

    def materialize(self) -> Float[Array, "*layers in out"]:
        update = self.scale * (self.a.astype(jnp.float32) @ self.b.astype(jnp.float32))
        return (materialize(self.base).astype(jnp.float32) + update).astype(self.dtype)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        update = matmul(matmul(dropout(x, self.rate, ctx.at("low_rank")), self.a), self.b, dtype)
        return dot(x, self.base, ctx, dtype) + self.scale * update

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        return take(self.base, ids, ctx) + self.scale * matmul(jnp.take(self.a, ids, axis=0), self.b)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        update = matmul_transposed(matmul_transposed(x, self.b), self.a, dtype)
        return attend(x, self.base, ctx, dtype) + self.scale * update

    def components(self, axes: Axes) -> dict[str, Component]:
        return {
            "base": Component(axes, "base"),
            "a": Component((axes[0], None), "factor"),
            "b": Component((None, axes[1]), "factor"),
        }
