"""Embedding factorization, ALBERT's other half: a table of narrow rows and one product, also as the tied head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Factored, flatten, materialize, unflatten
from jaxlm.evaluate.cost import parameters
from jaxlm.io.pretrained import LM
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.parallel import pad_vocab
from jaxlm.runner import registry

TABLE = "embed/tokens/embedding"
BATCH = {"input_ids": np.random.default_rng(0).integers(0, 37, (2, 6))}


@functools.cache
def factorized(rank):
    model = Network(model_config("gpt2", vocab_size=37, hidden_size=16, num_layers=2, num_heads=2, max_positions=8))
    entry = {"name": "svd", "rank": rank, "targets": TABLE, "larger": rank > 10}
    params = model.init(jax.random.key(0))
    _, small, axes = registry.make(registry.SURGERY, entry, "surgery", model=model, params=params, axes=model.axes())
    assert axes == model.axes() and isinstance(flatten(small)[TABLE], Factored)
    return model, params, small


@functools.cache
def forward(model):
    return jax.jit(lambda params: model.forward(params, BATCH)["logits"])


def with_table(params, table):
    return unflatten({**flatten(params), TABLE: table})


@pytest.mark.parametrize("rank", [3, 10, 16])
def test_the_model_is_that_of_the_product_and_the_product_the_nearest(rank):
    model, params, small = factorized(rank)
    product = materialize(flatten(small)[TABLE])
    found, expected = forward(model)(small), forward(model)(with_table(params, product))
    assert np.allclose(found, expected, atol=1e-5) and np.abs(expected).max() > 0.05
    dropped = np.linalg.svd(np.asarray(flatten(params)[TABLE]), compute_uv=False)[rank:]
    assert np.isclose(np.linalg.norm(product - flatten(params)[TABLE]), np.linalg.norm(dropped), atol=1e-5)
    saved = parameters(params).total - parameters(small).total
    assert saved == 37 * 16 - rank * (37 + 16)


def test_both_factors_learn_from_look_up_and_head():
    model, params, small = factorized(3)
    leaf = flatten(small)[TABLE]
    loss = lambda params: jnp.sum(jnp.sin(model.forward(params, BATCH)["logits"]))  # noqa: E731
    dense = flatten(jax.jit(jax.grad(loss))(with_table(params, materialize(leaf))))[TABLE]
    found = flatten(jax.jit(jax.grad(loss))(small))[TABLE]
    assert np.allclose(found.a, dense @ leaf.b.T, atol=1e-4) and np.allclose(found.b, leaf.a.T @ dense, atol=1e-4)


def test_a_vocabulary_that_is_padded_and_a_directory(tmp_path):
    model, _, small = factorized(3)
    padded = pad_vocab(small, model.axes(), 8)
    assert flatten(padded)[TABLE].a.shape == (40, 3) and flatten(padded)[TABLE].b.shape == (3, 16)
    assert np.allclose(forward(model)(padded)[..., :37], forward(model)(small), atol=1e-6)
    jaxlm.save(LM(model.config, small), tmp_path)
    again = jaxlm.load(tmp_path)
    assert np.array_equal(forward(model)(again.params), forward(model)(small))
