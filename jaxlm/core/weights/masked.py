"""Masked: a weight with entries switched off."""

import jax
import jax.numpy as jnp

from jaxlm.core.weight import Axes, Component, Weight, materialize


class Masked(Weight):
    """`W = base ⊙ mask`.

    The gradient of a masked entry is exactly zero.

    Attributes:
      base: array or Weight `[in, out]`.
      mask: bool `[in, out]`, true where the entry is kept.
    """

    base: jax.Array | Weight
    mask: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self) -> jax.Array:
        dense = materialize(self.base)
        return jnp.where(self.mask, dense, jnp.zeros((), dense.dtype))

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base"), "mask": Component(axes, "mask")}
