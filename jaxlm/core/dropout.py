"""Dropout, and the random bits for it: a hash of the entry's position, cheap enough to be computed where it is used."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxlm.core.context import Context


def random_bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """Random bits of this shape: the entry at position i (row-major) is `h(h(i + k₀) + k₁)` for the key's words k₀, k₁.

    h is a bijection of 32 bits in which every input bit flips every output bit with a probability close to a half. No
    state and no order of draws: the bits are the same on every mesh and back end, the compiler fuses them into whatever
    reads them, and the backward pass may draw them again instead of keeping them. They are good enough to drop
    activations by, nothing more; parameters are drawn with jax's generators.

    Source of h: the family of hashes found by Wellons, "Hash Function Prospector", 2018 (its `lowbias32`).

    >>> random_bits(jax.random.key(0), (2, 2)).reshape(-1).tolist() == random_bits(jax.random.key(0), (4,)).tolist()
    True
    """
    words = jax.random.key_data(key).reshape(-1)
    # From the slowest axis on and key first, so that only a sum along one row is left to the inner loop.
    position, stride = words[0], math.prod(shape)
    for axis, size in enumerate(shape):
        stride //= max(size, 1)
        iota_shape = [1] * len(shape)
        iota_shape[axis] = size
        index = jax.lax.broadcasted_iota(jnp.uint32, iota_shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
    return _hash(_hash(position) + words[1])


def _hash(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout(x: Float[Array, "*shape"], rate: float, ctx: Context) -> Float[Array, "*shape"]:
    """Inverted dropout: each entry is zeroed with probability `rate`, the others are divided by `1 - rate`.

    The decision is taken on 32 random bits. Identity when the context has no key.
    """
    if ctx.key is None or rate == 0.0:
        return x
    keep = random_bits(ctx.key, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x.astype(jnp.float32) * (1 / (1 - rate)), 0).astype(x.dtype)
