"""Factorization: the analytic error, ranks, what is refused, and a model that computes with its factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

import jaxlm
from jaxlm.core import Calibration, Factored, InputScaled, SurgeryContext, flatten, map_leaves, materialize, unflatten
from jaxlm.evaluate.cost import parameters
from jaxlm.io.lm import LM
from jaxlm.methods.factorize.svd import Amount, activation_svd, factorize, rank_of, svd, worthwhile
from jaxlm.methods.second_order import cholesky
from jaxlm.models import model_config

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 24)) * np.exp(RNG.normal(size=24)) + RNG.normal(size=(300, 3)) @ RNG.normal(size=(3, 24)) * 3
W = RNG.normal(size=(24, 40))


@pytest.mark.parametrize("rank", [1, 7, 23])
def test_the_error_on_the_inputs_is_the_sum_of_the_dropped_singular_values(rank):
    root = cholesky(X.T @ X, 0.0, "svd", "w")
    a, b = factorize(W, root, lambda values: rank)
    values = np.linalg.svd(X @ W, compute_uv=False)
    assert np.isclose(np.linalg.norm(X @ (W - a @ b)), np.sqrt((values[rank:] ** 2).sum()), rtol=1e-8)
    plain_a, plain_b = factorize(W, None, lambda values: rank)
    plain_values = np.linalg.svd(W, compute_uv=False)
    assert np.isclose(np.linalg.norm(W - plain_a @ plain_b), np.sqrt((plain_values[rank:] ** 2).sum()), rtol=1e-8)
    assert np.linalg.norm(X @ (W - a @ b)) < 0.95 * np.linalg.norm(X @ (W - plain_a @ plain_b))
    assert np.linalg.norm(W - plain_a @ plain_b) < np.linalg.norm(W - a @ b)


def test_ranks():
    values = np.array([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    ranks = {0.64: 1, 0.65: 2, 0.8: 2, 0.96: 3, 0.97: 4, 1.0: 4}
    assert {e: rank_of(values, (4, 4), Amount(energy=e)) for e in ranks} == ranks
    assert rank_of(values, (4, 4), Amount(rank=9)) == 4
    assert rank_of(np.ones(24), (24, 40), Amount(size=0.5)) == 7  # 7 * 64 <= 480 < 8 * 64
    assert rank_of(np.ones(24), (24, 40), Amount(size=1e-6)) == 1
    most = worthwhile(24, 40)
    assert most * 64 < 24 * 40 <= (most + 1) * 64


DENSE = LM.initialize(
    model_config("llama", vocab_size=17, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2), jax.random.key(0)
)
BATCH = {"input_ids": RNG.integers(1, 17, (4, 12)), "attention_mask": np.ones((4, 12), np.int32)}
CONTEXT = SurgeryContext(read_calibration=lambda lm: Calibration([BATCH]))


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(params):
    return DENSE.network.forward(params, BATCH)["logits"]


def logits(lm):
    return np.asarray(forward(lm.params))


def with_leaf(path, leaf):
    """The dense model with another leaf."""
    return DENSE.replace(params=unflatten(flatten(DENSE.params) | {path: leaf}))


def test_a_model_of_factors(tmp_path):
    small = svd(DENSE, size=0.5, targets=r".*(mlp|embed)/.*/(kernel|embedding)")
    leaf = small.params["layers_0"]["mlp"]["up"]["kernel"]
    assert isinstance(leaf, Factored) and leaf.a.shape[1] == int(0.5 * 16 * 64 / 80)
    assert isinstance(small.params["embed"]["tokens"]["embedding"], Factored), "looked up, and the tied head"
    assert parameters(small.params).total < 0.75 * parameters(DENSE.params).total
    products = small.replace(params=map_leaves(lambda path, leaf: materialize(leaf), small.params))
    assert np.abs(logits(small) - logits(products)).max() <= 1e-5
    jaxlm.save(small, tmp_path / "model")
    assert np.array_equal(logits(jaxlm.load(tmp_path / "model")), logits(small))
    assert small.axes == DENSE.network.axes() and small.config == DENSE.config


def test_everything_kept_is_the_same_function():
    for same in (svd(DENSE, rank=99, larger=True), activation_svd(DENSE, CONTEXT, rank=99, larger=True)):
        assert isinstance(same.params["layers_1"]["attention"]["key"]["kernel"], Factored)
        assert np.abs(logits(same) - logits(DENSE)).max() <= 1e-5


def test_activations_count():
    """Of two models of equal size, the one factored with its inputs gives closer logits on them."""
    plain, aware = svd(DENSE, size=0.6), activation_svd(DENSE, CONTEXT, size=0.6)
    assert parameters(plain.params).total == parameters(aware.params).total
    error = lambda lm: np.linalg.norm(logits(lm) - logits(DENSE))  # noqa: E731
    assert error(aware) < 0.9 * error(plain)


def test_below_scaled_inputs():
    path = "layers_0/mlp/up/kernel"
    scaled = with_leaf(path, InputScaled(flatten(DENSE.params)[path], jnp.full(16, 2.0)))
    small = activation_svd(scaled, CONTEXT, rank=4, targets=".*mlp/up/kernel")
    assert isinstance(flatten(small.params)[path].base, Factored)


def test_energy_leaves_what_gains_nothing():
    """Random square matrices are full of energy; the wide ones are not worth it either at 0.999."""
    path = "layers_0/attention/query/kernel"
    rank_one = jnp.asarray(np.outer(np.arange(1.0, 17), np.ones(16)), jnp.float32)
    flat = flatten(svd(with_leaf(path, rank_one), energy=0.999).params)
    assert [path for path, leaf in flat.items() if isinstance(leaf, Factored)] == [path]
    assert flat[path].a.shape == (16, 1)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"svd: give one of rank, energy and size, not none", {}),
        (r"svd: give one of rank, energy and size, not rank and size", {"rank": 2, "size": 0.5}),
        (r"svd: rank 0 must be at least 1", {"rank": 0}),
        (r"svd: energy must be in \(0, 1\], not 1.5", {"energy": 1.5}),
        (r"svd: with rank 8 the factors of layers_0/attention/query/kernel \[16, 16\] are no smaller", {"rank": 8}),
        (r"the largest rank that gains is 7 \(larger=True", {"rank": 8}),
        (r"svd: to hold 1.0 of the energy, every target needs factors as large as itself", {"energy": 1.0}),
        (r"svd: targets: the rule 'x' matches no parameter", {"rank": 1, "targets": "x"}),
    ],
)
def test_refused(message, options):
    with pytest.raises(ValueError, match=message):
        svd(DENSE, **options)


def test_dead_inputs_and_a_single_token():
    dead = X.copy()
    dead[:, :5] = 0
    for x in (dead, X[:1], np.ones_like(X)):
        a, b = factorize(W, cholesky(x.T @ x, 1e-4, "svd", "w"), lambda values: 4)
        assert np.isfinite(a @ b).all()
        assert np.linalg.norm(x @ (W - a @ b)) < 0.8 * np.linalg.norm(x @ W)
