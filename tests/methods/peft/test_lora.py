"""LoRA's initial distribution, strength, and what trains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Factored, Masked, Quantized, describe, dot, trainable
from jaxlm.methods.peft.lora import lora
from jaxlm.methods.peft.low_rank import LowRank

PARAMS = {
    "layers_0": {
        "attention": {n: {"kernel": jnp.ones((64, 48)), "bias": jnp.zeros(48)} for n in ("query", "key", "value")}
    },
    "head": {"output": {"kernel": jnp.ones((64, 3))}},
}


def init_attention(run, **options):
    """The attention of the layer once `init` has added the update."""
    start = lora(**options).init(jax.random.key(0), run.lm_of(PARAMS))
    return start.lm.params["layers_0"]["attention"]


def test_kaiming_uniform_and_zero(run):
    """peft's: uniform in ±1/sqrt(in), for every kernel another draw."""
    attention = init_attention(run, rank=8)
    a = np.asarray(attention["query"]["kernel"].a)
    assert a.shape == (64, 8) and attention["query"]["kernel"].b.shape == (8, 48)
    assert 0.95 / 8 < np.abs(a).max() <= 1 / 8 and np.isclose(a.std(), 1 / 8 / math.sqrt(3), rtol=0.05)
    assert not np.asarray(attention["query"]["kernel"].b).any()
    assert not np.array_equal(a, attention["value"]["kernel"].a)
    assert isinstance(attention["key"]["kernel"], jax.Array)


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 2.0), (True, 4.0)])
def test_strength(run, stabilized, scale):
    leaf = init_attention(run, rank=4, alpha=8.0, rank_stabilized=stabilized)["query"]["kernel"]
    assert leaf.scale == scale
    leaf = leaf.replace(b=jnp.ones((4, 48)))
    x = jnp.ones((1, 64))
    assert np.allclose(dot(x, leaf), x @ leaf.base + scale * (x @ leaf.a).sum(), rtol=1e-5)


def trained(method, lm):
    """Names of the arrays that train."""
    infos = describe(method.init(jax.random.key(0), lm).lm.params)
    return {name for name, info in infos.items() if trainable([method.trainable], info)}


def test_only_factors_and_the_head_train(run):
    factors = {f"layers_0/attention/{n}/kernel.{f}" for n in ("query", "value") for f in "ab"}
    assert trained(lora(), run.lm_of(PARAMS)) == factors | {"head/output/kernel"}


def test_the_factors_of_a_factored_base_stay(run):
    base = {"layers_0": {"attention": {"query": {"kernel": Factored(jnp.ones((8, 2)), jnp.ones((2, 6)))}}}}
    assert trained(lora(), run.lm_of(base)) == {f"layers_0/attention/query/kernel.{f}" for f in "ab"}


def test_baking_over_int8_is_dense_and_never_quantizes(run):
    base = Quantized.of(jax.random.normal(jax.random.key(0), (64, 48)))
    leaf = LowRank(base, jnp.full((64, 1), 1e-3), jnp.ones((1, 48)), scale=0.5)
    baked = lora().bake(run.lm_of({"w": {"kernel": leaf}}), {})
    assert np.allclose(baked.params["w"]["kernel"], base.materialize() + 5e-4, atol=1e-7)


def test_dropout_acts_while_training_only(run):
    leaf = init_attention(run, rank=4, dropout=0.5)["query"]["kernel"].replace(b=jnp.ones((4, 48)))
    x = jnp.ones((2, 64))
    assert np.array_equal(dot(x, leaf), dot(x, leaf.replace(rate=0.0)))
    assert not np.allclose(dot(x, leaf, Context(key=jax.random.key(0))), dot(x, leaf))


@pytest.mark.parametrize("inside", [lambda w: w, lambda w: Masked(w, jnp.ones(w.shape, bool))])
def test_a_base_that_quantizes_its_inputs_is_refused(run, inside):
    """What is merged would not quantize them: a baked model would be another than the one that was trained."""

    def quantized(**options):
        return run.lm_of({"query": {"kernel": inside(Quantized.of(jnp.eye(8), **options))}})

    method = lora(rank=2, targets=r"query/kernel")
    method.init(jax.random.key(0), quantized())
    with pytest.raises(ValueError, match=r"lora: query/kernel quantizes its inputs.*dynamic = False"):
        method.init(jax.random.key(0), quantized(dynamic=True))
