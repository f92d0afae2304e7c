"""One update: clipping, skipping what is not finite, keys by step, methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import Context, Loss, Method, Term, describe, dropout
from jaxlm.train.gradient import gradient
from jaxlm.train.optimizer import moments, optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import clip, create_state, dropout_key, make_step

PARAMS = {"a": {"kernel": jnp.array([[1.0, -2.0]])}, "b": {"bias": jnp.array([3.0])}, "c": {"scale": jnp.array([4.0])}}
NAMES = frozenset({"a/kernel", "b/bias"})


def loss_fn(params, constants, batch, ctx):
    """A bowl, whose gradient in `a` a batch can make infinite, and in `b` not a number."""
    a = jnp.sum(params["a"]["kernel"] ** 2) * batch["a"] + jnp.sum(dropout(params["a"]["kernel"], 0.5, ctx))
    b = jnp.sum(params["b"]["bias"] * params["c"]["scale"]) * batch["b"]
    return {"bowl": Term(a + b, jnp.float32(1))}, {}


GOOD = {"a": jnp.float32(1), "b": jnp.float32(1)}


def build(method=None, largest_norm=0.0, seed=0, **fields):
    settings = TrainSettings(**{"steps": 9, "learning_rate": 0.1, "schedule": "constant", **fields})
    infos = {n: i for n, i in describe(PARAMS).items() if n in NAMES}
    tx = optimizer(settings, 9, infos)
    grad = gradient(Loss(loss_fn), NAMES)
    step = make_step(grad, tx, method or Method(), NAMES, ctx=Context(), largest_norm=largest_norm)
    return jax.jit(step), create_state(dropout_key(seed), PARAMS, {"count": jnp.int32(0)}, tx, NAMES)


def test_only_what_trains_has_optimizer_state():
    _, state = build()
    assert [part.keys() for part in moments(state.optimizer, NAMES)] == [NAMES, NAMES]


def test_frozen_arrays_are_bit_identical_and_the_rest_moves():
    step, state = build()
    after, log = step(state, {}, GOOD)
    assert np.array_equal(after.params["c"]["scale"], [4.0]) and (after.params["b"]["bias"] != 3.0).all()
    assert log["finite"].keys() == NAMES and int(after.step) == 1
    assert {n: tuple(map(float, t)) for n, t in log["terms"].items()}["bowl"][1:] == (1.0, 1.0)


def test_the_gradient_norm_is_that_before_clipping():
    step, state = build(largest_norm=0.5, optimizer="sgd", b1=0.0)
    ctx = Context(key=jax.random.fold_in(jax.random.key(0), 0))
    grads, _ = gradient(Loss(loss_fn), NAMES)(PARAMS, {}, GOOD, ctx)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in grads.values()))
    after, log = step(state, {}, GOOD)
    assert np.isclose(log["gradient_norm"], norm) and norm > 0.5
    assert np.allclose(after.params["b"]["bias"], 3.0 - 0.1 * grads["b/bias"] * 0.5 / norm)


@pytest.mark.parametrize("largest", [0.0, 0.5, 100.0])
def test_clip_equals_optax(largest):
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}
    ours = clip(grads, optax.tree.norm(grads), largest)
    tx = optax.clip_by_global_norm(largest) if largest else optax.identity()
    theirs, _ = tx.update(grads, tx.init(grads))
    for name in grads:
        assert np.allclose(ours[name], theirs[name], rtol=1e-6)
    assert clip({"a": jnp.zeros(2)}, jnp.float32(0), 1.0)["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("a", "b", "bad"), [(jnp.inf, 1.0, {"a/kernel"}), (1.0, jnp.nan, {"b/bias"}), (1e30, 1.0, {"a/kernel"})], ids=str
)
def test_what_is_not_finite_is_skipped_and_named(a, b, bad):
    """1e30 is finite, but its square is not: so neither is the norm, and the update is skipped as well."""
    batch = {"a": jnp.float32(a), "b": jnp.float32(b)}
    counting = Method(update=lambda step, *_: step._replace(state={"count": step.state["count"] + 1}))
    step, state = build(counting)
    first, _ = step(state, {}, GOOD)
    second, log = step(first, {}, batch)
    assert {name for name, finite in log["finite"].items() if not finite} == bad
    assert int(log["nonfinite"]) == 1 and int(second.step) == 2
    for ours, before in zip(
        jax.tree.leaves((second.params, second.optimizer, second.method)),
        jax.tree.leaves((first.params, first.optimizer, first.method)),
        strict=True,
    ):
        assert np.array_equal(ours, before)
    third, log = step(second, {}, batch)
    assert int(log["nonfinite"]) == 2
    fourth, log = step(third, {}, GOOD)
    assert int(log["nonfinite"]) == 0 and int(fourth.method["count"]) == 2
    assert not np.array_equal(fourth.params["b"]["bias"], first.params["b"]["bias"])


def test_the_key_follows_the_step():
    """Another draw in every step, the same one when a step is taken again."""
    step, state = build(optimizer="sgd", b1=0.0, learning_rate=0.0)
    draws = []
    for _ in range(12):
        after, log = step(state, {}, GOOD)
        assert float(step(state, {}, GOOD)[1]["terms"]["bowl"][0]) == float(log["terms"]["bowl"][0])
        draws.append(float(log["terms"]["bowl"][0]))
        state = after
    assert len(set(draws)) > 2


def test_another_seed_is_other_data_to_the_same_program():
    """Otherwise every seed of a run would be compiled anew."""
    (step, one), (_, two) = build(seed=1), build(seed=2)
    assert step.lower(one, {}, GOOD).as_text() == step.lower(two, {}, GOOD).as_text()
    draws = {float(step(state, {}, GOOD)[1]["terms"]["bowl"][0]) for state in [build(seed=i)[1] for i in range(9)]}
    assert len(draws) > 1


def test_methods_see_updated_params_moments_and_the_number_of_the_step():
    seen = []

    def update(step, grads, constants, number):
        assert grads.keys() == NAMES and constants == {} and len(step.moments) == 2
        seen.append(True)
        moments = [{**m, "b/bias": jnp.zeros_like(m["b/bias"])} for m in step.moments]
        params = {**step.params, "b": {"bias": jnp.full_like(step.params["b"]["bias"], number)}}
        return step._replace(params=params, moments=moments)

    step, state = build(Method(update=update))
    for number in (1, 2):
        state, _ = step(state, {}, GOOD)
        assert state.params["b"]["bias"].tolist() == [number] and seen == [True]
        for part in moments(state.optimizer, NAMES):
            assert not np.asarray(part["b/bias"]).any() and np.asarray(part["a/kernel"]).all()


def test_layers_are_stacked_by_name_not_by_dimensions():
    """Three dimensions are a stack of matrices in `layers_0-1`, and the experts' own in one layer."""
    params = {
        "layers_0-1": {"up": {"kernel": jnp.ones((2, 3, 4))}},
        "layers_2": {"experts": {"kernel": jnp.ones((2, 3, 4))}},
    }
    names = frozenset({"layers_0-1/up/kernel", "layers_2/experts/kernel"})

    def fn(params, constants, batch, ctx):
        both = params["layers_0-1"]["up"]["kernel"], params["layers_2"]["experts"]["kernel"]
        return {"bowl": Term(sum(jnp.sum(w**2 * batch["factor"][:, None, None]) for w in both), jnp.float32(1))}, {}

    tx = optimizer(TrainSettings(steps=9, learning_rate=0.1, optimizer="adafactor"), 9, describe(params))
    step = make_step(gradient(Loss(fn), names), tx, Method(), names, ctx=Context(), largest_norm=1.0)
    state = create_state(dropout_key(0), params, {}, tx, names)
    _, log = jax.jit(step)(state, {}, {"factor": jnp.array([1.0, jnp.nan])})
    assert {name: finite.tolist() for name, finite in log["finite"].items()} == {
        "layers_0-1/up/kernel": [True, False],
        "layers_2/experts/kernel": False,
    }
