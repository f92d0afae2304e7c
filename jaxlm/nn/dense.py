"""Dense layers, embeddings and activations."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Context, Dim, Parameter, dim, dot, take


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """`x Φ(x)` with the normal distribution Φ; its derivative `Φ(x) + x φ(x)` is recomputed from `x`.

    >>> round(float(gelu(jnp.float32(1.0))), 4)
    0.8413
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g * (_normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def dense_spec(inputs: Dim, outputs: Dim, bias: bool, std: float = 0.02) -> dict[str, Parameter]:
    """Parameters of `x @ kernel + bias`, kernel `[in, out]`."""
    spec = {"kernel": Parameter((inputs, outputs), std=std)}
    return spec | {"bias": Parameter((outputs,))} if bias else spec


def dense(params: Mapping[str, Any], x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
    """`x @ kernel + bias` for `x [..., in]`, in `dtype`, by default that of `x`.

    The bias is added, and its gradient summed, in float32.
    """
    y = dot(x, params["kernel"], ctx, dtype)
    return (y.astype(jnp.float32) + params["bias"]).astype(y.dtype) if "bias" in params else y


def embedding_spec(rows: int, name: str, width: int, std: float = 0.02) -> dict[str, Parameter]:
    """A table `[rows, width]` whose rows carry the axis `name`."""
    return {"embedding": Parameter((dim(**{name: rows}), dim(embed=width)), std=std)}


def embed(params: Mapping[str, Any], ids: jax.Array, ctx: Context) -> jax.Array:
    """Rows of the table: int ids `[...]` to `[..., width]`."""
    return take(params["embedding"], ids, ctx)


def norm_spec(kind: str, width: int) -> dict[str, Parameter]:
    """Scale, and for `layer` a bias."""
    spec = {"scale": Parameter((dim(embed=width),), constant=1.0)}
    return spec | {"bias": Parameter((dim(embed=width),))} if kind == "layer" else spec


def norm(kind: str, params: Mapping[str, Any], x: jax.Array, eps: float, hidden: jax.Array | None = None) -> jax.Array:
    """`layer`: `(x - mean) / sqrt(var + ε) · scale + bias`; `rms`: `x / sqrt(mean(x²) + ε) · scale`. In float32.

    With a gate `hidden [width]` the means are weighted by it and the result is gated: equal to the norm of a residual
    stream without the closed dimensions, and zero in those.
    """
    y = x.astype(jnp.float32)
    if hidden is not None:
        weights = hidden / jnp.sum(hidden)
        if kind == "layer":
            y = y - jnp.sum(y * weights, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.sum(jnp.square(y) * weights, axis=-1, keepdims=True) + eps) * params["scale"]
        return ((y + params["bias"] if kind == "layer" else y) * hidden).astype(x.dtype)
    if kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * params["scale"]
    return (y + params["bias"] if kind == "layer" else y).astype(x.dtype)


def residual_std(layers: int, std: float = 0.02) -> float:
    """Initial standard deviation of projections into the residual stream: `std / sqrt(2 · layers)` (GPT-2)."""
    return std / math.sqrt(2 * max(layers, 1))
