"""Quantized: int8 codes with a scale a channel, and the integer product."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.context import Context
from jaxlm.core.product import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight

LEVELS = 127
"""Largest code of symmetric int8; -128 stays unused, so that the range is symmetric."""


def scale_of(x: jax.Array, axis: int) -> jax.Array:
    """Symmetric scale `max|x| / 127` along `axis` (kept as 1), float32; 1 where a slice is all zero.

    >>> scale_of(jnp.array([[-63.5, 0.0]]), axis=0).tolist()
    [[0.5, 1.0]]
    """
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=True) / LEVELS
    return jnp.where(scale == 0, 1.0, scale)


def round_to_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`clip(round(x / scale), -127, 127)` as int8, rounding half to even."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -LEVELS, LEVELS).astype(jnp.int8)


class Quantized(Weight):
    """`W = codes · scale`, symmetric int8 with one scale a channel.

    `channel` says which dimension owns the scales: -1 (outputs, for kernels) or -2 (rows, for embedding tables, whose
    rows are the outputs of a tied head). With `dynamic` inputs each row of `x` is quantized too, with its own
    `max|x| / 127`, and the product runs in integers: `(round(x/s_x) · codes)_int32 · s_x · scale`. Its derivative in
    `x` is that of `x W`, so that what lies below it can be trained. Without, the codes are widened and multiplied in
    floats.

    Attributes:
      codes: int8 `[in, out]`.
      scale: float32 `[1, out]` or `[in, 1]`.
      dynamic: quantize the inputs a token at a time and multiply integers. Static.
      channel: dimension with a scale of its own, -1 or -2. Static.
      dtype_name: dtype of the materialized matrix. Static.
    """

    codes: jax.Array
    scale: jax.Array
    dynamic: bool = struct.field(pytree_node=False, default=False)
    channel: int = struct.field(pytree_node=False, default=-1)
    dtype_name: str = struct.field(pytree_node=False, default="float32")

    @classmethod
    def of(cls, w: jax.Array, dynamic: bool = False, channel: int = -1) -> "Quantized":
        """Round to nearest: codes and scales of a dense matrix `[..., in, out]`."""
        scale = scale_of(w, axis=-3 - channel)
        return cls(round_to_codes(w, scale), scale, dynamic=dynamic, channel=channel, dtype_name=w.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self):
        return jnp.dtype(self.dtype_name)

    def materialize(self) -> jax.Array:
        return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)

    def dot(self, x: jax.Array, ctx: Context) -> jax.Array:
        if self.channel == -1:
            return self._product(x, self.codes, self.scale)
        return matmul(x, self.materialize())

    def attend(self, x: jax.Array, ctx: Context) -> jax.Array:
        if self.channel == -2:
            return self._product(x, self.codes.T, self.scale.T)
        return matmul_transposed(x, self.materialize())

    def _product(self, x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        product = rounded_product(x, codes) if self.dynamic else matmul(x, codes).astype(jnp.float32)
        return (product * scale[0]).astype(x.dtype)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        rows = jnp.take(self.codes, ids, axis=0).astype(jnp.float32)
        scale = self.scale[0] if self.channel == -1 else jnp.take(self.scale, ids, axis=0)
        return (rows * scale).astype(self.dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        scale_axes = (None, axes[1]) if self.channel == -1 else (axes[0], None)
        return {"codes": Component(axes, "codes"), "scale": Component(scale_axes, "buffer")}


@jax.custom_vjp
def rounded_product(x: jax.Array, codes: jax.Array) -> jax.Array:
    """`x @ codes` in integers, each row of `x` rounded; float32, differentiated in `x` as if nothing were rounded."""
    row_scale = scale_of(x, axis=-1)
    return integer_product(round_to_codes(x, row_scale), codes) * row_scale


def _unrounded(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    codes, like = kept
    return matmul_transposed(g.astype(like.dtype), codes), None


rounded_product.defvjp(lambda x, codes: (rounded_product(x, codes), (codes, x[..., :0])), _unrounded)


def integer_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 `[..., in]` times int8 `[in, out]`, accumulated in int32 and returned as float32.

    Fewer than eight rows are padded to eight: XLA's CPU back end runs a one-row integer product about ten times slower
    than an eight-row one, and zero rows do not change the others.
    """
    rows = x.reshape(-1, x.shape[-1])
    few = rows.shape[0]
    if few < 8:
        rows = jnp.pad(rows, ((0, 8 - few), (0, 0)))
    product = jax.lax.dot_general(rows, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return product[:few].astype(jnp.float32).reshape(*x.shape[:-1], w.shape[-1])
