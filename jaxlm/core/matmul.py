"""Matrix products of activations with weights, and their gradients, in the form that is fastest where they run.

Operands are multiplied in the dtype of the activation and accumulated in float32, forward and backward: with bfloat16
activations all three products (output, gradient of the input, gradient of the weight) take bfloat16 operands, and the
gradient of the weight leaves the accumulator in float32. So does the output where it is asked for in float32, as
logits are. Results carry a name, by which layers keep them for the backward pass while they recompute the rest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Num

PRODUCT = "product"
"""Name of what layers keep for the backward pass, for `jax.checkpoint` policies."""

Contract = tuple[tuple[int, ...], tuple[int, ...]]


def _dot(a: Float[Array, "..."], b: Float[Array, "..."], contract: Contract) -> Float32[Array, "..."]:
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def matmul(
    x: Float[Array, "*batch in"], w: Num[Array, "in out"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """`x @ w` in `dtype`, by default that of `x`.

    The operands have the dtype of `x` whatever `dtype` is. Integers in `w` (codes) are widened to it and have no
    gradient.

    >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[4.0, 6.0]]
    """
    return _matmul(x, _floating(w, x), x.dtype if dtype is None else jnp.dtype(dtype))


def matmul_transposed(
    x: Float[Array, "*batch in"], w: Num[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """`x @ wᵀ` in `dtype`, by default that of `x`.

    >>> matmul_transposed(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0, 7.0]]
    """
    return _matmul_transposed(x, _floating(w, x), x.dtype if dtype is None else jnp.dtype(dtype))


def kept(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`y`, with the name by which layers keep it for the backward pass instead of recomputing it.

    For the forward rules of gradients: by itself it has none, so second derivatives exist in float32 only. A bfloat16
    array is kept as its bits, since XLA's CPU back end widens stacks of bfloat16 arrays to float32, whole and in every
    layer.
    """
    if y.dtype != jnp.bfloat16:
        return checkpoint_name(y, PRODUCT)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(y, jnp.uint16), PRODUCT)
    return jax.lax.bitcast_convert_type(bits, y.dtype)


def _floating(w: Num[Array, "*shape"], x: Float[Array, "..."]) -> Float[Array, "*shape"]:
    return w if jnp.issubdtype(w.dtype, jnp.floating) else w.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Float[Array, "*batch in"], w: Float[Array, "in out"], dtype: DTypeLike) -> Float[Array, "*batch out"]:
    return _dot(x, w.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_transposed(
    x: Float[Array, "*batch in"], w: Float[Array, "out in"], dtype: DTypeLike
) -> Float[Array, "*batch out"]:
    return _dot(x, w.astype(x.dtype), ((x.ndim - 1,), (1,))).astype(dtype)


def _matmul_backward(
    dtype: DTypeLike,
    residuals: tuple[Float[Array, "*batch in"], Float[Array, "in out"]],
    g: Float[Array, "*batch out"],
) -> tuple[Float[Array, "*batch in"], Float[Array, "in out"]]:
    x, w = residuals
    g = g.astype(x.dtype)
    return _matmul_transposed(g, w, x.dtype), _outer(x, g).astype(w.dtype)


def _transposed_backward(
    dtype: DTypeLike,
    residuals: tuple[Float[Array, "*batch in"], Float[Array, "out in"]],
    g: Float[Array, "*batch out"],
) -> tuple[Float[Array, "*batch in"], Float[Array, "out in"]]:
    x, w = residuals
    g = g.astype(x.dtype)
    return _matmul(g, w, x.dtype), _outer(x, g).T.astype(w.dtype)


_matmul.defvjp(lambda x, w, dtype: (kept(_matmul(x, w, dtype)), (x, w)), _matmul_backward)
_matmul_transposed.defvjp(lambda x, w, dtype: (kept(_matmul_transposed(x, w, dtype)), (x, w)), _transposed_backward)


def _outer(x: Float[Array, "*batch in"], g: Float[Array, "*batch out"]) -> Float32[Array, "in out"]:
    """`Σ xᵀ g` over all rows.

    The sum runs over the first axis of both sides. XLA's CPU back end has its fast kernels for a left side that is
    summed over its last axis, in bfloat16 for no other, and is 1.3 (float32) to 2 times (bfloat16) as fast where the
    left side is turned in memory first: the narrower of the two, which may be `g`, the result then being turned. XLA
    undoes a plain transpose of a matrix; of an array of three axes it does not. The result is held to row-major order:
    a bfloat16 product written in any other is one it has no kernel for at all.
    """
    rows = tuple(range(x.ndim - 1))
    if x.ndim < 3:
        return _dot(x, g, (rows, rows))

    def turned(a: Float[Array, "*batch m"], b: Float[Array, "*batch n"]) -> Float32[Array, "m n"]:
        a = jnp.moveaxis(a, -1, 0).reshape(a.shape[-1], -1)
        return with_layout_constraint(_dot(a, b.reshape(-1, b.shape[-1]), ((1,), (0,))), Layout((0, 1)))

    def narrower_turned(x: Float[Array, "*batch in"], g: Float[Array, "*batch out"]) -> Float32[Array, "in out"]:
        return turned(x, g) if x.shape[-1] <= g.shape[-1] else turned(g, x).T

    return jax.lax.platform_dependent(x, g, cpu=narrower_turned, default=lambda x, g: _dot(x, g, (rows, rows)))
