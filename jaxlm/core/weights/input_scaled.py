"""InputScaled: a weight whose inputs are scaled first."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Weight, attend, dot, materialize, take


class InputScaled(Weight):
    """`W = diag(scale) base`, run as `(x ⊙ scale) base`: the base meets the scaled inputs.

    SmoothQuant and AWQ divide inputs by `s` and multiply the rows of the base by it; where `1/s` cannot be folded into
    what made the inputs (a norm whose output is the residual stream too), it stays here. A base that rounds its inputs
    rounds the scaled ones, which is the point.

    Attributes:
      base: array or Weight `[in, out]`.
      scale: float32 `[in]`.
    """

    base: jax.Array | Weight
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self) -> jax.Array:
        return (materialize(self.base).astype(jnp.float32) * self.scale[:, None]).astype(self.dtype)

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return dot((x.astype(jnp.float32) * self.scale).astype(x.dtype), self.base, ctx, dtype)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        rows, scale = take(self.base, ids, ctx), jnp.take(self.scale, ids, axis=0)[..., None]
        return (rows.astype(jnp.float32) * scale).astype(rows.dtype)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        y = attend(x, self.base, ctx, dtype)
        return (y.astype(jnp.float32) * self.scale).astype(y.dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base"), "scale": Component((axes[0],), "buffer")}
