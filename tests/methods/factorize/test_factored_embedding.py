"""Embedding factorization, ALBERT's other half: a table of narrow rows and one product, also as the tied head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Factored, flatten, materialize, unflatten
from jaxlm.evaluate.cost import parameters
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.parallel import pad_vocab
from jaxlm.runner import registry

TABLE = "embed/tokens/embedding"
BATCH = {"input_ids": np.random.default_rng(0).integers(0, 37, (2, 6))}


@functools.cache
def factorized(rank):
    """A model, and the same with its token table as two factors."""
    config = model_config("gpt2", vocab_size=37, hidden_size=16, num_layers=2, num_heads=2, max_positions=8)
    lm = LM.initialize(config, jax.random.key(0))
    small = registry.operate({"name": "svd", "rank": rank, "targets": TABLE, "larger": rank > 10}, lm)
    assert small.axes == lm.network.axes() and isinstance(table(small), Factored)
    return lm, small


@functools.cache
def _forward(network):
    return jax.jit(lambda params: network.forward(params, BATCH)["logits"])


def logits(lm):
    return _forward(lm.network)(lm.params)


def table(lm):
    return flatten(lm.params)[TABLE]


def with_table(lm, table):
    return lm.replace(params=unflatten({**flatten(lm.params), TABLE: table}))


@pytest.mark.parametrize("rank", [3, 10, 16])
def test_the_model_is_that_of_the_product_and_the_product_the_nearest(rank):
    lm, small = factorized(rank)
    product = materialize(table(small))
    expected = logits(with_table(lm, product))
    assert np.allclose(logits(small), expected, atol=1e-5) and np.abs(expected).max() > 0.05
    dropped = np.linalg.svd(np.asarray(table(lm)), compute_uv=False)[rank:]
    assert np.isclose(np.linalg.norm(product - table(lm)), np.linalg.norm(dropped), atol=1e-5)
    saved = parameters(lm.params).total - parameters(small.params).total
    assert saved == 37 * 16 - rank * (37 + 16)


def test_both_factors_learn_from_look_up_and_head():
    lm, small = factorized(3)
    factors = table(small)
    loss = lambda params: jnp.sum(jnp.sin(lm.network.forward(params, BATCH)["logits"]))  # noqa: E731
    grad = jax.jit(jax.grad(loss))
    dense = flatten(grad(with_table(lm, materialize(factors)).params))[TABLE]
    factored = flatten(grad(small.params))[TABLE]
    assert np.allclose(factored.a, dense @ factors.b.T, atol=1e-4)
    assert np.allclose(factored.b, factors.a.T @ dense, atol=1e-4)


def test_a_vocabulary_that_is_padded_and_a_directory(tmp_path):
    _, small = factorized(3)
    padded = small.replace(params=pad_vocab(small.params, small.axes, 8))
    assert table(padded).a.shape == (40, 3) and table(padded).b.shape == (3, 16)
    assert np.allclose(logits(padded)[..., :37], logits(small), atol=1e-6)
    jaxlm.save(small, tmp_path)
    assert np.array_equal(logits(jaxlm.load(tmp_path)), logits(small))
