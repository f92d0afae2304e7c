"""Magnitude pruning: which entries go, the cubic schedule, and the surgery."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import FakeQuant, Masked, Method, Quantized, Step, materialize
from jaxlm.methods.bake import bake
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.schedule import cubic
from jaxlm.methods.prune.unstructured.magnitude import magnitude, prune_magnitude
from jaxlm.methods.prune.unstructured.patterns import keep_largest


def test_cubic_by_hand():
    for t in range(30):
        progress = min(max((t - 5) / 15, 0), 1)
        assert np.isclose(cubic(t, 0.8, 5, 20, initial=0.2), 0.8 - 0.6 * (1 - progress) ** 3, atol=1e-6)
    assert float(cubic(4, 0.5, 5, 5)) == 0 and float(cubic(5, 0.5, 5, 5)) == 0.5


def kernels(leaf, head):
    return {"layers_0": {"mlp": {"up": {"kernel": leaf}}}, "head": {"output": {"kernel": head}}}


def updated(method, lm, number=1):
    lm, _, state = method.init(jax.random.key(0), lm)
    return method.update(Step(lm.params, [], state), {}, {}, jnp.int32(number)).params


def test_a_mask_that_is_there_is_used_and_others_are_left_alone(run):
    first = Masked(jnp.arange(8.0).reshape(2, 4), jnp.arange(8).reshape(2, 4) > 1)
    lm = run.lm_of(kernels(first, Masked(jnp.ones((2, 4)), jnp.eye(2, 4) > 0)))
    method = magnitude(sparsity=0.5, end=1)
    assert jax.tree.structure(method.init(jax.random.key(0), lm).lm.params) == jax.tree.structure(lm.params)
    after = updated(method, lm)
    assert np.array_equal(after["layers_0"]["mlp"]["up"]["kernel"].mask, [[False] * 4, [True] * 4])
    assert np.array_equal(after["head"]["output"]["kernel"].mask, np.eye(2, 4) > 0)


@pytest.mark.parametrize("inner", [LowRank, Quantized])
def test_masks_of_weights_that_are_no_arrays(inner, run):
    """The merged matrix is scored; only the mask changes."""
    dense = jax.random.normal(jax.random.key(0), (6, 8))
    leaf = Quantized.of(dense) if inner is Quantized else LowRank(dense, jnp.ones((6, 1)), jnp.ones((1, 8)))
    lm = run.lm_of(kernels(leaf, dense))
    after = updated(magnitude(sparsity=0.5, end=1), lm)["layers_0"]["mlp"]["up"]["kernel"]
    assert np.array_equal(after.mask, keep_largest(jnp.abs(materialize(leaf)), 0.5))
    assert jax.tree.structure(after.base) == jax.tree.structure(leaf)


# Surgery -------------------------------------------------------------------------------------------------------------

DENSE = jax.random.normal(jax.random.key(1), (8, 8))


def test_surgery_masks_at_once_and_keeps_the_rest(run):
    lm = run.lm_of(kernels(DENSE, DENSE), axes={"x": ()})
    after = prune_magnitude(lm, sparsity=0.5)
    leaf = after.params["layers_0"]["mlp"]["up"]["kernel"]
    assert after.config is lm.config and after.axes == lm.axes and after.axes["x"] == ()
    assert after.params["head"]["output"]["kernel"] is DENSE
    assert np.array_equal(leaf.mask, keep_largest(jnp.abs(DENSE), 0.5))
    assert np.array_equal(leaf.base, np.where(leaf.mask, DENSE, 0))
    plain = bake(after).params["layers_0"]["mlp"]["up"]["kernel"]
    assert np.array_equal(plain, leaf.base) and isinstance(plain, jax.Array)


def test_surgery_by_pattern_by_rule_and_over_the_model(run):
    lm = run.lm_of(kernels(DENSE, 3 * DENSE))
    both = {"targets": ".*kernel"}
    up, head = (
        lambda lm: np.asarray(lm.params["layers_0"]["mlp"]["up"]["kernel"].mask),
        lambda lm: np.asarray(lm.params["head"]["output"]["kernel"].mask),
    )
    after = prune_magnitude(lm, pattern="1:4", **both)
    assert (up(after).reshape(2, 4, 8).sum(axis=1) == 1).all()
    after = prune_magnitude(lm, sparsity=((r"head/.*", 0.25), (".*", 0.5)), **both)
    assert (~head(after)).sum() == 16 and (~up(after)).sum() == 32
    after = prune_magnitude(lm, sparsity=0.5, per="model", **both)
    assert (~head(after)).sum() + (~up(after)).sum() == 64 and (~up(after)).sum() > 40


def test_surgery_of_what_is_masked_and_fake_quantized_already(run):
    """A mask stays, and goes below a FakeQuant; iterated pruning counts what is gone."""
    leaf = FakeQuant(Masked(DENSE, keep_largest(jnp.abs(DENSE), 0.25)))
    after = prune_magnitude(run.lm_of(kernels(leaf, DENSE)), sparsity=0.75)
    pruned = after.params["layers_0"]["mlp"]["up"]["kernel"]
    assert isinstance(pruned, FakeQuant) and np.array_equal(pruned.base.mask, keep_largest(jnp.abs(DENSE), 0.75))


def test_zeros_of_the_surgery_survive_training_without_a_method(run):
    closed = prune_magnitude(run.start(lambda values, i: values), sparsity=0.5).params
    followed = run.follow(Method(), 10, wrap=lambda values, i: closed[f"layers_{i}"]["mlp"]["up"]["kernel"])
    first, last = run.leaf(followed.states[0]), run.leaf(followed.states[-1])
    mask = np.asarray(first.mask)
    assert np.array_equal(last.mask, mask) and not np.asarray(last.base)[~mask].any()
    assert (np.asarray(last.base) != np.asarray(first.base))[mask].all()
