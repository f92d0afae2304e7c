"""LoRA's initial distribution, strength, and what trains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Factored, LowRank, Masked, Quantized, describe, dot, trainable
from jaxlm.methods.peft.lora import lora

PARAMS = {
    "layers_0": {
        "attention": {n: {"kernel": jnp.ones((64, 48)), "bias": jnp.zeros(48)} for n in ("query", "key", "value")}
    },
    "head": {"output": {"kernel": jnp.ones((64, 3))}},
}


def adapted(**arguments):
    return lora(**arguments).init(jax.random.key(0), None, PARAMS, {}).params["layers_0"]["attention"]


def test_kaiming_uniform_and_zero():
    """peft's: uniform in ±1/sqrt(in), for every kernel another draw."""
    found = adapted(rank=8)
    a = np.asarray(found["query"]["kernel"].a)
    assert a.shape == (64, 8) and found["query"]["kernel"].b.shape == (8, 48)
    assert 0.95 / 8 < np.abs(a).max() <= 1 / 8 and np.isclose(a.std(), 1 / 8 / math.sqrt(3), rtol=0.05)
    assert not np.asarray(found["query"]["kernel"].b).any()
    assert not np.array_equal(a, found["value"]["kernel"].a)
    assert isinstance(found["key"]["kernel"], jax.Array)


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 2.0), (True, 4.0)])
def test_strength(stabilized, scale):
    leaf = adapted(rank=4, alpha=8.0, rank_stabilized=stabilized)["query"]["kernel"]
    assert leaf.scale == scale
    leaf = leaf.replace(b=jnp.ones((4, 48)))
    x = jnp.ones((1, 64))
    assert np.allclose(dot(x, leaf), x @ leaf.base + scale * (x @ leaf.a).sum(), rtol=1e-5)


def test_only_factors_and_the_head_train():
    method = lora()
    params = method.init(jax.random.key(0), None, PARAMS, {}).params
    learns = {n for n, info in describe(params).items() if trainable([method.trainable], info)}
    factors = {f"layers_0/attention/{n}/kernel.{f}" for n in ("query", "value") for f in "ab"}
    assert learns == factors | {"head/output/kernel"}


def test_the_factors_of_a_factored_base_stay():
    base = {"layers_0": {"attention": {"query": {"kernel": Factored(jnp.ones((8, 2)), jnp.ones((2, 6)))}}}}
    method = lora()
    infos = describe(method.init(jax.random.key(0), None, base, {}).params)
    learns = {n for n, info in infos.items() if trainable([method.trainable], info)}
    assert learns == {f"layers_0/attention/query/kernel.{f}" for f in "ab"}


def test_baking_over_int8_is_dense_and_never_rounds():
    base = Quantized.of(jax.random.normal(jax.random.key(0), (64, 48)))
    leaf = LowRank(base, jnp.full((64, 1), 1e-3), jnp.ones((1, 48)), scale=0.5)
    _, params, _ = lora().bake(None, {"w": {"kernel": leaf}}, {}, {})
    assert np.allclose(params["w"]["kernel"], base.materialize() + 5e-4, atol=1e-7)


def test_dropout_acts_while_training_only():
    leaf = adapted(rank=4, dropout=0.5)["query"]["kernel"].replace(b=jnp.ones((4, 48)))
    x = jnp.ones((2, 64))
    assert np.array_equal(dot(x, leaf), dot(x, leaf.replace(rate=0.0)))
    assert not np.allclose(dot(x, leaf, Context(key=jax.random.key(0))), dot(x, leaf))


@pytest.mark.parametrize("inside", [lambda w: w, lambda w: Masked(w, jnp.ones(w.shape, bool))])
def test_a_base_that_rounds_its_inputs_is_refused(inside):
    """What is merged would not round them, so a baked model would be another than the one that was trained."""

    def params(**options):
        return {"query": {"kernel": inside(Quantized.of(jnp.eye(8), **options))}}

    method = lora(rank=2, targets=r"query/kernel")
    method.init(jax.random.key(0), None, params(), {})
    with pytest.raises(ValueError, match=r"lora: query/kernel rounds its inputs.*dynamic = False"):
        method.init(jax.random.key(0), None, params(dynamic=True), {})
