"""InputScaled: a weight whose inputs are scaled first."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Wrapper, attend, dot, materialize, take


class InputScaled(Wrapper):
    """`W = diag(scale) base`, run as `(x ⊙ scale) base`: the base meets the scaled inputs.

    SmoothQuant and AWQ divide inputs by `s` and multiply the rows of the base by it; where `1/s` cannot be folded into
    what made the inputs (a norm whose output is the residual stream too), it stays here. A base that quantizes its
    inputs quantizes the scaled ones, which is the point.
    """

    scale: Float32[Array, "*layers in"]

    def materialize(self) -> Float[Array, "*layers in out"]:
        return (materialize(self.base).astype(jnp.float32) * self.scale[..., None]).astype(self.dtype)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        return dot((x.astype(jnp.float32) * self.scale).astype(x.dtype), self.base, ctx, dtype)

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        rows, scale = take(self.base, ids, ctx), jnp.take(self.scale, ids, axis=0)[..., None]
        return (rows.astype(jnp.float32) * scale).astype(rows.dtype)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        y = attend(x, self.base, ctx, dtype)
        return (y.astype(jnp.float32) * self.scale).astype(y.dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base"), "scale": Component((axes[0],), "buffer")}
