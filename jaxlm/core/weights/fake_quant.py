"""FakeQuant: quantization-aware training with a straight-through estimator."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.context import Context
from jaxlm.core.product import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight, materialize
from jaxlm.core.weights.quantized import LEVELS, Quantized, scale_of


def fake_quantize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`q(x) = scale · clip(round(x/scale), ±127)`, with the gradient of the identity inside the range and 0 outside.

    The range is closed: the entry that sets a scale lies on its border and learns like any other, whatever the rounding
    of `127 · (max/127)`. Source: Bengio et al. 2013, arXiv:1308.3432.

    >>> fake_quantize(jnp.array([0.7, 0.8, 99.0]), jnp.array(0.5)).tolist()
    [0.5, 1.0, 63.5]
    """
    steps = x.astype(jnp.float32) / scale
    rounded = (jnp.clip(jnp.round(steps), -LEVELS, LEVELS) * scale).astype(x.dtype)
    inside = jnp.abs(steps) <= LEVELS * (1 + 1e-6)
    # The second summand is exactly zero, so the value is the rounded one to the bit.
    return jax.lax.stop_gradient(rounded) + jnp.where(inside, x - jax.lax.stop_gradient(x), 0)


class FakeQuant(Weight):
    """`W = q(base)`: the float weight is trained, the forward pass sees its int8 rounding.

    Scales follow the weight: symmetric, one a channel, recomputed in every pass and not differentiated, exactly
    as `Quantized.of` computes them, so that `quantize()` stores the function that was trained.

    Attributes:
      base: array or Weight `[in, out]`.
      dynamic: also round the inputs, a token at a time. Static.
      channel: dimension with a scale of its own, as in `Quantized`. Static.
    """

    base: jax.Array | Weight
    dynamic: bool = struct.field(pytree_node=False, default=False)
    channel: int = struct.field(pytree_node=False, default=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self) -> jax.Array:
        dense = materialize(self.base)
        return fake_quantize(dense, jax.lax.stop_gradient(scale_of(dense, axis=-3 - self.channel)))

    def dot(self, x: jax.Array, ctx: Context) -> jax.Array:
        return matmul(self._rounded(x) if self.channel == -1 else x, self.materialize())

    def attend(self, x: jax.Array, ctx: Context) -> jax.Array:
        return matmul_transposed(self._rounded(x) if self.channel == -2 else x, self.materialize())

    def _rounded(self, x: jax.Array) -> jax.Array:
        """The inputs as an integer product would see them."""
        return fake_quantize(x, jax.lax.stop_gradient(scale_of(x, axis=-1))) if self.dynamic else x

    def quantize(self) -> Quantized:
        """The stored form: the same function with int8 codes."""
        return Quantized.of(materialize(self.base), dynamic=self.dynamic, channel=self.channel)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base")}
