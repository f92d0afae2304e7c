"""Dropout and its bits: rates, independence, and the same draw on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, dropout
from jaxlm.core.dropout import random_bits


def test_dropout_keeps_the_mean_and_its_rate():
    x = jnp.ones(200_000)
    for rate in (0.1, 0.5):
        y = np.asarray(dropout(x, rate, Context(key=jax.random.key(0))))
        assert np.isclose((y == 0).mean(), rate, atol=4e-3) and np.isclose(y.mean(), 1, atol=1e-2)
        assert np.allclose(y[y > 0], 1 / (1 - rate), rtol=1e-4)


def test_dropout_does_nothing_without_a_key_or_a_rate():
    x = jax.random.normal(jax.random.key(0), (5,))
    assert dropout(x, 0.5, Context()) is x and dropout(x, 0.0, Context(key=jax.random.key(0))) is x
    assert dropout(x.astype(jnp.bfloat16), 0.5, Context(key=jax.random.key(0))).dtype == jnp.bfloat16


def mixed(x):
    """The hash in numpy."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1), (0, 4)])
def test_the_bits_are_the_hash_of_the_position(shape):
    key = jax.random.key(5)
    first, second = np.asarray(jax.random.key_data(key))
    with np.errstate(over="ignore"):
        expected = mixed(mixed(np.arange(np.prod(shape), dtype=np.uint32) + first) + second).reshape(shape)
    assert np.array_equal(random_bits(key, shape), expected)


def test_every_bit_is_fair_and_neighbours_and_keys_are_independent():
    """Within five standard errors of a fair coin: single bits, equal bits of neighbours, equal bits of two keys."""
    n = 1 << 16
    draws = [np.asarray(random_bits(jax.random.fold_in(jax.random.key(0), i), (n,))) for i in range(4)]
    bits = [np.unpackbits(d.view(np.uint8)).reshape(n, 32) for d in draws]
    bound = 5 * 0.5 / n**0.5
    for b in bits:
        assert np.abs(b.mean(0) - 0.5).max() < bound
        for lag in (1, 2, 64, 1024):
            assert np.abs((b[lag:] == b[:-lag]).mean(0) - 0.5).max() < 5 * 0.5 / (n - lag) ** 0.5
    for i in range(4):
        for j in range(i):
            assert np.abs((bits[i] == bits[j]).mean(0) - 0.5).max() < bound
    assert all(len(np.unique(d)) == n for d in draws)  # a bijection of the position


def test_rows_keep_as_many_as_a_binomial_does():
    """The number kept in rows of 64: mean, variance and correlation of neighbouring rows."""
    kept = np.asarray(random_bits(jax.random.key(3), (20_000, 64)) >= np.uint32(0.1 * 2**32)).sum(1)
    assert abs(kept.mean() - 57.6) < 0.1 and abs(kept.var() - 5.76) < 0.3
    assert abs(np.corrcoef(kept[1:], kept[:-1])[0, 1]) < 0.035


def test_a_mesh_draws_the_same_bits():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
    key, shape = jax.random.key(1), (8, 3, 6)
    sharded = jax.jit(lambda key: random_bits(key, shape), out_shardings=sharding)(key)
    assert np.array_equal(sharded, random_bits(key, shape))
