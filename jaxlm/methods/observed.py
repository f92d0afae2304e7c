"""Observed: a weight whose inputs are observed."""

from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.core import Axes, Component, Context, Wrapper, attend, dot, materialize, take


class Observed(Wrapper):
    """`W = base`; every `dot` first calls `ctx.observe(name, x)`, where the context has an observer.

    It exists while a layer is calibrated and is never stored.

    Attributes:
      base: the weight itself.
      name: passed to the observer. Static.
    """

    name: str = struct.field(pytree_node=False, default="")

    def materialize(self) -> Float[Array, "*layers in out"]:
        return materialize(self.base)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        if ctx.observe is not None:
            ctx.observe(self.name, x)
        return dot(x, self.base, ctx, dtype)

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        return take(self.base, ids, ctx)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        return attend(x, self.base, ctx, dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base")}
