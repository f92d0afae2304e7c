"""Products of codes: integers times integers, exact, in the form that is fastest for the platform and the shape."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8, Int32, Num

from jaxlm.core.cpu import fast_bfloat16
from jaxlm.core.weights.scheme import INTEGERS, Scale, Scheme, ZeroPoint, from_codes, grouped

EXACT = 2**24
"""float32 holds every integer up to here, so a sum of products that stays below is exact in it."""


def scaled_product(
    x: Num[Array, "rows in"],
    x_zero: Int8[Array, "#rows 1"] | None,
    codes: Num[Array, "_ _"],
    scale: Scale,
    zero: ZeroPoint | None,
    scheme: Scheme,
    axis: int = -2,
) -> Float32[Array, "rows out"]:
    """`Σ_k (x_k - z_x) · (codes_k - z) · scale`, without the scale of the inputs.

    Integers are accumulated in int32, one sum a group:

        Σ_g s_g [ Σ_k x_k c_k  -  z_g Σ_k x_k  -  z_x (Σ_k c_k - n_g z_g) ]

    Groups on a CPU are the exception: there partial sums, which XLA runs as batched products, take up to nine times
    as long as the product of the inputs' codes with the weight in float32, which differs by float32's rounding.

    Args:
      x, x_zero: codes of the inputs, int8 or a float8, and their zero points, one a row or one in all.
      codes, scale, zero: of the weight, its inputs at `axis`: `codes` is `[in, out]`, with -1 `[out, in]`.
    """
    if scheme.bits not in INTEGERS:
        return _float8_product(x, codes, axis) * _row(scale, axis)
    if scale.shape[axis] == 1:
        sums = integer_product(x, codes, axis, largest=2 ** (scheme.width - 1))
        return _corrected(sums, x, x_zero, codes, zero, axis).astype(jnp.float32) * _row(scale, axis)

    def group_sums(
        x: Int[Array, "rows in"],
        x_zero: Int8[Array, "#rows 1"] | None,
        codes: Int[Array, "_ _"],
        scale: Scale,
        zero: ZeroPoint | None,
    ) -> Float32[Array, "rows out"]:
        parts = jnp.moveaxis(grouped(codes, scheme, axis), axis % 2, 0)  # [groups, group, out] or [groups, out, group]
        rows = jnp.moveaxis(grouped(x, scheme, -1), -2, 0)  # [groups, rows, group]
        zeros = None if zero is None else jnp.expand_dims(jnp.moveaxis(zero, axis, 0), axis)
        count = jnp.minimum(codes.shape[axis] - jnp.arange(len(parts)) * parts.shape[axis], parts.shape[axis])
        contract = (((2,), (parts.ndim + axis,)), ((0,), (0,)))
        sums = jax.lax.dot_general(rows, parts.astype(jnp.int8), contract, preferred_element_type=jnp.int32)
        sums = _corrected(sums, rows, x_zero, parts, zeros, axis, count[:, None, None])
        return jnp.sum(sums.astype(jnp.float32) * jnp.moveaxis(scale, axis, 0)[:, None, :], axis=0)

    def in_floats(
        x: Int[Array, "rows in"],
        x_zero: Int8[Array, "#rows 1"] | None,
        codes: Int[Array, "_ _"],
        scale: Scale,
        zero: ZeroPoint | None,
    ) -> Float32[Array, "rows out"]:
        x = x.astype(jnp.float32) - (0 if x_zero is None else x_zero.astype(jnp.float32))
        w = from_codes(codes, scale, zero, scheme, axis)
        return x @ (w if axis == -2 else w.T)

    return jax.lax.platform_dependent(x, x_zero, codes, scale, zero, cpu=in_floats, default=group_sums)


def _corrected(
    sums: Int32[Array, "*groups rows out"],
    x: Int[Array, "*groups rows in"],
    x_zero: Int8[Array, "#rows 1"] | None,
    codes: Int[Array, "*groups _ _"],
    zero: Int8[Array, "*groups _ _"] | None,
    axis: int,
    count: Int[Array, "*groups 1 1"] | None = None,
) -> Int32[Array, "*groups rows out"]:
    """Sums of products of codes less what the zero points contribute; `count` inputs are in each group, or all."""
    sum_int32 = functools.partial(jnp.sum, dtype=jnp.int32)
    if zero is not None:
        sums = sums - _row(zero, axis).astype(jnp.int32) * sum_int32(x, axis=-1, keepdims=True)
    if x_zero is not None:
        code_sums = sum_int32(codes, axis=axis, keepdims=True)
        if zero is not None:
            code_sums = code_sums - (codes.shape[axis] if count is None else count) * zero.astype(jnp.int32)
        sums = sums - x_zero.astype(jnp.int32) * _row(code_sums, axis)
    return sums


def _row(scale: Num[Array, "... m n"], axis: int) -> Num[Array, "... _ _"]:
    """A value of each output (a scale, say) as a row `[1, out]`, whichever dimension of the weight its inputs are."""
    return scale if axis == -2 else jnp.swapaxes(scale, -1, -2)


def integer_product(
    x: Int[Array, "rows in"], w: Int[Array, "_ _"], axis: int = -2, largest: int = 128
) -> Int32[Array, "rows out"]:
    """Codes times codes `[in, out]` (`[out, in]` with axis -1): exact sums of products.

    Fewer than eight rows are padded to eight on a CPU: XLA runs a one-row integer product there about ten times slower
    than an eight-row one, and zero rows do not change the others. A CPU with bf16 instructions multiplies the codes as
    bfloat16, which holds them exactly, where no sum can leave what float32 holds exactly: faster than its int8.

    Args:
      largest: bound on |w|; 128 for int8, 8 for int4.
    """
    contract = (((1,), (axis % 2,)), ((), ()))

    def integers(x: Int[Array, "rows in"], w: Int[Array, "_ _"]) -> Int32[Array, "rows out"]:
        return jax.lax.dot_general(x, w.astype(jnp.int8), contract, preferred_element_type=jnp.int32)

    def on_cpu(x: Int[Array, "rows in"], w: Int[Array, "_ _"]) -> Int32[Array, "rows out"]:
        rows = x.shape[0]
        if rows < 8:
            return integers(jnp.pad(x, ((0, 8 - rows), (0, 0))), w)[:rows]
        if rows < 64 or x.shape[1] * 128 * largest > EXACT or not fast_bfloat16():
            return integers(x, w)
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32).astype(jnp.int32)

    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=integers)


def _float8_product(x: Float[Array, "rows in"], w: Float[Array, "_ _"], axis: int) -> Float32[Array, "rows out"]:
    """float8 codes times float8 codes, summed in float32; a CPU, which has no such product, multiplies in float32."""
    contract = (((1,), (axis % 2,)), ((), ()))

    def product(
        x: Float[Array, "rows in"], w: Float[Array, "_ _"], dtype: DTypeLike | None = None
    ) -> Float32[Array, "rows out"]:
        x, w = (x, w) if dtype is None else (x.astype(dtype), w.astype(dtype))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)

    wide = functools.partial(product, dtype=jnp.float32)
    return jax.lax.platform_dependent(x, w, cpu=wide, default=product)
