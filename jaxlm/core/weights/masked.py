"""Masked: a weight with entries switched off."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxlm.core.weight import Axes, Component, Wrapper, materialize


class Masked(Wrapper):
    """`W = base ⊙ mask`.

    The gradient of a masked entry is exactly zero, or with `dense_grad` that of `W`: what the entry would learn if it
    were there, which methods that bring entries back have to know (the straight-through estimator).

    Attributes:
      base: the weight before masking.
      mask: true where the entry is kept.
      dense_grad: the gradient passes where the mask is false, too. Static.
    """

    mask: Bool[Array, "*layers in out"]
    dense_grad: bool = struct.field(pytree_node=False, default=False)

    def materialize(self) -> Float[Array, "*layers in out"]:
        dense = materialize(self.base)
        # x - x is exactly zero, and has the gradient of x where only the second is held constant.
        hidden = dense - jax.lax.stop_gradient(dense) if self.dense_grad else jnp.zeros((), dense.dtype)
        return jnp.where(self.mask, dense, hidden)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base"), "mask": Component(axes, "mask")}
