"""Factored: a weight as the product of two narrow ones."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Weight, attend, dot, materialize, take


class Factored(Weight):
    """`W = a b` of rank r, run as `(x a) b`: `r (in + out)` products instead of `in · out`.

    Both factors train, and each may be a Weight itself (quantized, say).
    """

    a: Float[Array, "*layers in rank"] | Weight
    b: Float[Array, "*layers rank out"] | Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.a.dtype

    def materialize(self) -> Float[Array, "*layers in out"]:
        product = materialize(self.a).astype(jnp.float32) @ materialize(self.b).astype(jnp.float32)
        return product.astype(self.dtype)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        return dot(dot(x, self.a, ctx), self.b, ctx, dtype)

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        return dot(take(self.a, ids, ctx), self.b, ctx)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        return attend(attend(x, self.b, ctx), self.a, ctx, dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"a": Component((axes[0], None), "factor"), "b": Component((None, axes[1]), "factor")}
