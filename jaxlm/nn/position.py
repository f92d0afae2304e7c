"""Rotary embeddings and T5's relative position buckets."""

import math

import jax
import jax.numpy as jnp

from jaxlm.nn.layer import Rotary


def frequencies(rotary: Rotary, head_dim: int) -> jax.Array:
    """Angular frequencies `theta^(-2i/d)` for `i < d/2`, after scaling, float32 `[head_dim / 2]`.

    Sources: Su et al. 2021, arXiv:2104.09864; the `llama3` interpolation is that of Llama 3.1.
    """
    inverse = rotary.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rotary.scaling == "linear":
        return inverse / rotary.factor
    if rotary.scaling == "llama3":
        rotations = rotary.original_max_positions * inverse / (2 * math.pi)
        low, high = rotary.low_freq_factor, rotary.high_freq_factor
        smooth = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
        return inverse * ((1 - smooth) / rotary.factor + smooth)
    return inverse


def rotate(x: jax.Array, positions: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotary embedding: the pairs `(x_i, x_{i + d/2})` rotated by `position · frequency_i`.

    Args:
      x: `[batch, length, ..., head_dim]`.
      positions: int `[batch, length]`.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(rotary, x.shape[-1])
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), angles.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def relative_bucket(distance: jax.Array, causal: bool, buckets: int, max_distance: int) -> jax.Array:
    """T5's bucket of `key position - query position`: exact for small distances, logarithmic up to `max_distance`.

    Source: Raffel et al. 2020, arXiv:1910.10683.

    >>> relative_bucket(jnp.array([0, -1, -200]), causal=True, buckets=32, max_distance=128).tolist()
    [0, 1, 31]
    """
    offset = jnp.zeros_like(distance)
    if causal:
        distance = jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(distance.dtype), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)
