"""Magnitude pruning: exact counts, zeros that stay zero under Adam and decay, the cubic schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compress.magnitude import keep_largest, magnitude
from jaxlm.compress.schedule import cubic, due
from jaxlm.core import (
    Context,
    FakeQuant,
    Loss,
    LowRank,
    Masked,
    Quantized,
    Step,
    Term,
    describe,
    dot,
    materialize,
    trainable,
)
from jaxlm.train.gradient import gradient
from jaxlm.train.optimizer import moments, optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import create_state, dropout_key, make_step

# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
KERNEL = "layers_0-1/mlp/up/kernel"


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
def test_exactly_as_many_as_asked_for(sparsity, kind):
    scores = {
        "random": jax.random.uniform(jax.random.key(0), (13, 17)),
        "ties": jax.random.randint(jax.random.key(0), (13, 17), 0, 3).astype(jnp.float32),
        "zeros": jnp.zeros((13, 17)),
    }[kind]
    mask = np.asarray(keep_largest(scores, sparsity))
    assert (~mask).sum() == round(sparsity * 221)
    if mask.any() and not mask.all():
        assert np.asarray(scores)[mask].min() >= np.asarray(scores)[~mask].max()


def test_cubic_by_hand():
    for t in range(30):
        progress = min(max((t - 5) / 15, 0), 1)
        assert np.isclose(cubic(t, 0.8, 5, 20, initial=0.2), 0.8 - 0.6 * (1 - progress) ** 3, atol=1e-6)
    assert float(cubic(4, 0.5, 5, 5)) == 0 and float(cubic(5, 0.5, 5, 5)) == 0.5


def test_due_at_the_ends_and_in_between():
    assert [t for t in range(1, 40) if due(t, 3, 20, 5)] == [3, 8, 13, 18, 20]
    assert [t for t in range(1, 40) if due(t, 7, 7, 5)] == [7]


def run(steps, wrap=lambda leaf: leaf, **arguments):
    """Training of two stacked 6x8 matrices towards a target: states after every step."""
    params = {"layers_0-1": {"mlp": {"up": {"kernel": wrap(jax.random.normal(jax.random.key(0), (2, 6, 8)))}}}}
    method = magnitude(**arguments)
    x, target = (jax.random.normal(jax.random.key(s), (2, 5, n)) for s, n in ((1, 6), (2, 8)))

    def fn(params, constants, batch, ctx):
        out = jax.vmap(lambda w, x: dot(x, w))(params["layers_0-1"]["mlp"]["up"]["kernel"], x)
        return {"squares": Term(jnp.sum((out - target) ** 2), jnp.float32(1))}, {}

    params = method.init(jax.random.key(0), None, params, {}).params
    verdicts = [method.trainable]
    infos = {name: info for name, info in describe(params).items() if trainable(verdicts, info)}
    tx = optimizer(TrainSettings(steps=9, learning_rate=0.05, schedule="constant", weight_decay=0.3), 9, infos)
    step = jax.jit(make_step(gradient(Loss(fn), verdicts), tx, method, verdicts, ctx=Context(), largest_norm=0))
    state = create_state(dropout_key(0), params, {}, tx, verdicts)
    states = [state]
    for _ in range(steps):
        state, _ = step(state, {}, {})
        states.append(state)
    return method, states


def kernel(state):
    return state.params["layers_0-1"]["mlp"]["up"]["kernel"]


@pytest.fixture(scope="module")
def trained():
    return run(24, sparsity=0.75, begin=2, end=11, every=3)


def test_the_schedule_is_kept_in_every_layer(trained):
    _, states = trained
    now = 0.0
    for number, state in enumerate(states):
        if number in (2, 5, 8, 11):
            now = round(float(cubic(number, 0.75, 2, 11)) * 48)
        assert [(~np.asarray(mask)).sum() for mask in kernel(state).mask] == [now, now]
    assert now == 36


def test_zeros_stay_exactly_zero_in_weights_and_moments(trained):
    """Twelve steps of Adam with decay after the last mask; neither may move what the forward pass does not see."""
    _, states = trained
    names = frozenset({f"{KERNEL}.base"})
    for state in states[11:]:
        mask = np.asarray(kernel(state).mask)
        assert np.array_equal(mask, kernel(states[11]).mask)
        assert not np.asarray(kernel(state).base)[~mask].any()
        both = moments(state.optimizer, names)
        assert len(both) == 2
        for moment in both:
            values = np.asarray(moment[f"{KERNEL}.base"])
            assert not values[~mask].any() and values[mask].all()


def test_what_is_kept_goes_on_learning(trained):
    _, states = trained
    mask = np.asarray(kernel(states[-1]).mask)
    assert (np.asarray(kernel(states[-1]).base) != np.asarray(kernel(states[12]).base))[mask].all()


def test_baking_stores_the_zeros(trained):
    method, states = trained
    _, params, _ = method.bake(None, states[-1].params, {}, {})
    assert np.array_equal(kernel(states[-1]).materialize(), params["layers_0-1"]["mlp"]["up"]["kernel"])


def test_masks_go_below_roundings():
    """So that a pruned weight is zero before it is rounded, and baking keeps codes."""
    _, states = run(4, wrap=lambda leaf: FakeQuant(leaf), sparsity=0.5, end=3, every=1)
    last = kernel(states[-1])
    assert isinstance(last, FakeQuant) and isinstance(last.base, Masked)
    assert [float(np.mean(mask)) for mask in last.base.mask] == [0.5, 0.5]
    assert not np.asarray(last.base.base)[~np.asarray(last.base.mask)].any()
    assert not np.asarray(moments(states[-1].optimizer, frozenset({f"{KERNEL}.base.base"}))[0][f"{KERNEL}.base.base"])[
        ~np.asarray(last.base.mask)
    ].any()


def test_a_mask_that_is_there_is_used_and_others_are_left_alone():
    params = {
        "layers_0": {"mlp": {"up": {"kernel": Masked(jnp.arange(8.0).reshape(2, 4), jnp.arange(8).reshape(2, 4) > 1)}}},
        "head": {"output": {"kernel": Masked(jnp.ones((2, 4)), jnp.eye(2, 4) > 0)}},
    }
    method = magnitude(sparsity=0.5, end=1)
    start = method.init(jax.random.key(0), None, params, {}).params
    assert jax.tree.structure(start) == jax.tree.structure(params)

    after = method.update(Step(start, [], {}), {}, {}, jnp.int32(1)).params
    assert np.array_equal(after["layers_0"]["mlp"]["up"]["kernel"].mask, [[False] * 4, [True] * 4])
    assert np.array_equal(after["head"]["output"]["kernel"].mask, np.eye(2, 4) > 0)


@pytest.mark.parametrize("inner", [LowRank, Quantized])
def test_masks_of_weights_that_are_no_arrays(inner):
    """The merged matrix is scored; only the mask changes."""
    dense = jax.random.normal(jax.random.key(0), (6, 8))
    leaf = Quantized.of(dense) if inner is Quantized else LowRank(dense, jnp.ones((6, 1)), jnp.ones((1, 8)))
    params = {"layers_0": {"mlp": {"up": {"kernel": leaf}}}}
    method = magnitude(sparsity=0.5, end=1)

    start = method.init(jax.random.key(0), None, params, {}).params
    after = method.update(Step(start, [], {}), {}, {}, jnp.int32(1)).params["layers_0"]["mlp"]["up"]["kernel"]
    assert np.array_equal(after.mask, keep_largest(jnp.abs(materialize(leaf)), 0.5))
    assert jax.tree.structure(after.base) == jax.tree.structure(leaf)
