"""Observed: a weight whose inputs are looked at."""

from typing import Any

import jax
from flax import struct

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Weight, attend, dot, materialize, take


class Observed(Weight):
    """`W = base`; every `dot` first calls `ctx.observe(name, x)`, where the context has an observer.

    It exists while a layer is calibrated and is never stored.

    Attributes:
      base: array or Weight `[in, out]`.
      name: what the observer is told. Static.
    """

    base: jax.Array | Weight
    name: str = struct.field(pytree_node=False, default="")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self) -> jax.Array:
        return materialize(self.base)

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        if ctx.observe is not None:
            ctx.observe(self.name, x)
        return dot(x, self.base, ctx, dtype)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        return take(self.base, ids, ctx)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return attend(x, self.base, ctx, dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base")}
