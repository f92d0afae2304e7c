"""Dropout, and the random bits for it: a hash of the entry's place, cheap enough to be computed where it is used."""

import jax
import jax.numpy as jnp

from jaxlm.core.context import Context


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 `shape`: the entry at place i (row-major) is `h(h(i + k₀) + k₁)` for the key's words k₀ and k₁.

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
    place, stride = words[0], _size(shape)
    for axis, size in enumerate(shape):
        stride //= max(size, 1)
        along = [1] * len(shape)
        along[axis] = size
        place = place + jax.lax.broadcasted_iota(jnp.uint32, along, axis) * jnp.uint32(stride % 2**32)
    return _mixed(_mixed(place) + words[1])


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def dropout(x: jax.Array, rate: float, ctx: Context) -> jax.Array:
    """Inverted dropout: each entry is zeroed with probability `rate`, the others are divided by `1 - rate`.

    The decision is taken on 32 random bits. Identity when the context has no key.
    """
    if ctx.key is None or rate == 0.0:
        return x
    keep = random_bits(ctx.key, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x.astype(jnp.float32) * (1 / (1 - rate)), 0).astype(x.dtype)
