"""Attention's custom gradient against jax's derivative of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, dropout
from jaxlm.nn import dot_product
from jaxlm.nn.dot_product import dot_product_attention, scores

pytestmark = pytest.mark.slow

BATCH, QUERIES, KEYS, KV_HEADS, Q_PER_KV, HEAD_DIM = 2, 5, 7, 3, 2, 4


def plain(rate, q, k, v, bias, mask, key):
    """The formula as it is written down."""
    kept = dropout(jax.nn.softmax(scores(q, k, bias, mask)), rate, Context(key))
    return jnp.einsum("bkgqs,bskd->bqkgd", kept, v)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (BATCH, QUERIES, KV_HEADS, Q_PER_KV, HEAD_DIM))
    k, v = jax.random.normal(keys[1], (2, BATCH, KEYS, KV_HEADS, HEAD_DIM))
    bias = jax.random.normal(keys[2], (1, KV_HEADS, Q_PER_KV, QUERIES, KEYS))
    g = jax.random.normal(keys[3], q.shape)
    mask = jax.random.bernoulli(keys[4], 0.7, (BATCH, QUERIES, KEYS))
    mask = mask.at[0, 1].set(False)  # one query attends to nothing
    return q, k, v, bias, mask, g


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("biased", ["no bias", "shared bias", "a bias each"])
def test_output_and_gradients_are_those_of_the_formula(inputs, rate, biased):
    q, k, v, bias, mask, g = inputs
    bias = {"no bias": None, "shared bias": bias, "a bias each": jnp.concatenate([bias, 2 * bias])}[biased]

    def both(function):
        attend = lambda *a: function(rate, *a, mask, jax.random.key(7))  # noqa: E731
        out, pull = jax.vjp(attend, q, k, v, bias)
        return out, pull(g)

    for ours, theirs in zip(*map(jax.tree.leaves, (both(dot_product_attention), both(plain))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("biased", ["shared bias", "a bias each"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_blocks_of_queries_change_nothing(inputs, monkeypatch, block, biased, dtype, tolerance):
    q, k, v, bias, mask, g = inputs
    bias = bias if biased == "shared bias" else jnp.concatenate([bias, 2 * bias])
    q, k, v, g = (a.astype(dtype) for a in (q, k, v, g))
    whole, pull = jax.vjp(lambda *a: dot_product_attention(0.0, *a, mask, None), q, k, v, bias)
    monkeypatch.setattr(dot_product, "BLOCK", block)
    blocks, pull_blocks = jax.vjp(lambda *a: dot_product_attention(0.0, *a, mask, None), q, k, v, bias)
    for ours, theirs in zip((blocks, *pull_blocks(g)), (whole, *pull(g)), strict=True):
        ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance * max(np.abs(theirs).max(), 1), rtol=1e-5)


def test_blocks_drop_each_their_own(inputs, monkeypatch):
    """With equal queries, keys and values one all over, what is left of a row is its dropout."""
    q, k, v, _, mask, _ = (jnp.ones_like(a) for a in inputs)
    monkeypatch.setattr(dot_product, "BLOCK", 1)
    out = dot_product_attention(0.5, q, k, v, None, mask, jax.random.key(0))[0, :, :, 0, 0]
    assert len(np.unique(out, axis=0)) > 1


def test_dropout_drops(inputs):
    q, k, v, bias, mask, _ = inputs
    dropped = dot_product_attention(0.5, q, k, v, bias, mask, jax.random.key(1))
    again = dot_product_attention(0.5, q, k, v, bias, mask, jax.random.key(1))
    none = dot_product_attention(0.5, q, k, v, bias, mask, None)
    assert np.array_equal(dropped, again) and not np.allclose(dropped, none)
    assert np.array_equal(none, dot_product_attention(0.0, q, k, v, bias, mask, jax.random.key(1)))


def test_bfloat16_is_near_float32(inputs):
    q, k, v, bias, mask, g = inputs
    exact, pull = jax.vjp(lambda *a: dot_product_attention(0.0, *a, bias, mask, None), q, k, v)
    short, pull_short = jax.vjp(
        lambda *a: dot_product_attention(0.0, *a, bias, mask, None), *(a.astype(jnp.bfloat16) for a in (q, k, v))
    )
    for a, b in zip((short, *pull_short(g.astype(jnp.bfloat16))), (exact, *pull(g)), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a.astype(np.float32) - b).max() <= 0.03 * np.abs(b).max()


def test_no_matrix_of_queries_by_keys_is_kept_a_head(inputs):
    q, k, v, _, mask, _ = inputs
    pull = jax.eval_shape(
        lambda *a: jax.vjp(lambda *b: dot_product_attention(0.1, *b, None, mask, None), *a)[1], q, k, v
    )
    kept = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert kept and not any(len(shape) > 3 and shape[-2:] == (QUERIES, KEYS) for shape in kept)
