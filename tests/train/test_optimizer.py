"""Optimizers equal optax's on plain trees; rules, schedules and stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import Masked, describe, unflatten
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.train.optimizer import OPTIMIZERS, decays, learning_rate_factor, moments, optimizer, schedule, with_moments
from jaxlm.train.settings import TrainSettings

SHAPES = {
    "layers_0-2/mlp/up/kernel": (3, 4, 5),
    "layers_0-2/mlp/up/bias": (3, 5),
    "layers_3/mlp/up/kernel": (4, 5),
    "final_norm/scale": (4,),
    "embed/tokens/embedding": (7, 4),
}
NAMES = tuple(SHAPES)


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(NAMES))
    return {n: jax.random.normal(k, s) for n, k, s in zip(NAMES, keys, SHAPES.values(), strict=True)}


def infos_of(flat):
    return describe(unflatten(flat))


INFOS = infos_of(tree(0))


def settings_of(**fields):
    return TrainSettings(**{"steps": 10, "learning_rate": 0.1, "schedule": "linear", **fields})


def run(tx, params, steps=4):
    state = tx.init(params)
    step = jax.jit(tx.update)
    for i in range(steps):
        updates, state = step(tree(10 + i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= tolerance * max(1.0, np.abs(b[name]).max()), name


def rate(count):
    return 0.1 * (1 - count / 10)


DECAYING = {name: name.endswith(("kernel", "embedding")) for name in NAMES}
OPTAX = {
    "adamw": lambda: optax.adamw(rate, 0.8, 0.95, 1e-6, weight_decay=0.2, mask=DECAYING),
    "lion": lambda: optax.lion(rate, 0.8, 0.95, weight_decay=0.2, mask=DECAYING),
    "sgd": lambda: optax.chain(
        optax.trace(0.8), optax.add_decayed_weights(0.2, DECAYING), optax.scale_by_learning_rate(rate)
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax(name):
    ours = optimizer(settings_of(optimizer=name, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.2), 10, INFOS)
    close(run(ours, tree(0))[0], run(OPTAX[name](), tree(0))[0])


def test_every_optimizer_is_here():
    assert OPTIMIZERS.keys() == OPTAX.keys() | {"adafactor"}


def test_sgd_without_momentum_is_plain():
    params, _ = run(optimizer(settings_of(optimizer="sgd", b1=0.0, schedule="constant"), 10, INFOS), tree(0), steps=1)
    close(params, {n: p - 0.1 * tree(10)[n] for n, p in tree(0).items()})


def test_adafactor_of_stacked_layers_is_that_of_each():
    """Its factored statistics and its clipping span an array, so they must not span a stack."""
    name, shape = "layers_0-1/up/kernel", (2, 130, 140)
    big = {name: jax.random.normal(jax.random.key(0), shape) * jnp.array([1.0, 50.0])[:, None, None]}
    grads = {name: jax.random.normal(jax.random.key(1), shape) * jnp.array([9.0, 0.1])[:, None, None]}
    reference = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    ours = optimizer(settings_of(optimizer="adafactor", schedule="constant"), 10, infos_of(big))
    state, states = ours.init(big), [reference.init({"k": big[name][i]}) for i in range(2)]
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (2, 130) in shapes and (2, 140) in shapes and (2, 130, 140) not in shapes, "not factored"
    for _ in range(2):
        updates, state = ours.update(grads, state, big)
        for i in range(2):
            own = {"k": grads[name][i]}
            expected, states[i] = reference.update(own, states[i], {"k": big[name][i]})
            assert np.allclose(updates[name][i], -0.1 * expected["k"], rtol=1e-5, atol=1e-7)


# Rules ---------------------------------------------------------------------------------------------------------------


def test_decay_by_role_and_path():
    w = jnp.ones((2, 2))
    params = {
        "up": {"kernel": LowRank(Masked(w, w > 0), w, w), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
        "embed": {"embedding": w},
    }
    default = {n for n, info in describe(params).items() if decays(info, settings_of())}
    assert default == {"up/kernel.base.base", "up/kernel.a", "up/kernel.b", "embed/embedding"}
    rules = settings_of(decay=(("embed/.*", False), (".*/bias", True), (".*#factor", False), (".*", True)))
    chosen = {n for n, info in describe(params).items() if decays(info, rules)}
    assert chosen == {"up/kernel.base.base", "up/bias", "norm/scale"}


def test_learning_rates_by_layer_are_a_vector_on_stacked_layers():
    rules = (("layers_0/.*", 0.1), ("layers_2/.*kernel", 0.5), ("layers_3/.*", 0.0), ("embed/.*", 2.0))
    tx = optimizer(settings_of(optimizer="sgd", b1=0.0, schedule="constant", learning_rates=rules), 10, INFOS)
    params, _ = run(tx, tree(0), steps=1)
    factors = {
        NAMES[0]: np.array([0.1, 1.0, 0.5])[:, None, None],
        NAMES[1]: np.array([0.1, 1.0, 1.0])[:, None],
        NAMES[2]: 0.0,
        NAMES[3]: 1.0,
        NAMES[4]: 2.0,
    }
    close(params, {n: p - 0.1 * factors[n] * tree(10)[n] for n, p in tree(0).items()})
    assert learning_rate_factor(INFOS[NAMES[0]], settings_of(), (3, 4, 5)) == 1.0


@pytest.mark.parametrize("field", ["decay", "learning_rates"])
def test_a_rule_that_matches_nothing_is_refused(field):
    message = rf"config\.train\.{field}: the rule 'layers_1/mpl.*' matches no parameter; .*layers_1/mlp"
    with pytest.raises(ValueError, match=message):
        optimizer(settings_of(**{field: (("layers_1/mpl/.*", 0.0),)}), 10, INFOS)
    optimizer(settings_of(**{field: (("layers_1/mlp/.*", 0.0),)}), 10, INFOS)  # inside a stack


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        optimizer(settings_of(optimizer="adam"), 10, INFOS)
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        schedule(settings_of(schedule="cosin"), 10)


# Schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {4: 1.0, 9: 0.75, 14: 0.5, 24: 0.0, 99: 0.0}),
        ("cosine", {4: 1.0, 9: 0.8535534, 14: 0.5, 24: 0.0, 99: 0.0}),
        ("constant", {4: 1.0, 14: 1.0, 99: 1.0}),
        ("inverse_sqrt", {4: 1.0, 9: 2 / 3, 16: 0.5, 64: 0.25}),
    ],
)
def test_schedules_at_exact_points(name, expected):
    fn = schedule(settings_of(learning_rate=3.0, schedule=name, warmup=4), 24)
    warm = {0: 0.25, 1: 0.5, 3: 1.0}
    for step, share in (warm | expected).items():
        assert np.isclose(fn(jnp.int32(step)), 3.0 * share, atol=1e-6), step


def test_the_final_share_is_kept():
    for name in ("linear", "cosine"):
        fn = schedule(settings_of(learning_rate=2.0, schedule=name, final_learning_rate=0.1), 10)
        assert np.isclose(fn(0), 2.0) and np.isclose(fn(10), 0.2) and np.isclose(fn(50), 0.2)
        assert np.isclose(fn(5), 2.0 * 0.55)


def test_warmup_as_a_share():
    fn = schedule(settings_of(warmup=0.5, schedule="constant"), 8)
    assert np.allclose([fn(t) for t in range(5)], [0.025, 0.05, 0.075, 0.1, 0.1])


# Moments -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("adamw", 2), ("lion", 1), ("sgd", 1), ("adafactor", 0)])
def test_moments_there_and_back(name, count):
    tx = optimizer(settings_of(optimizer=name, weight_decay=0.1), 10, INFOS)
    _, state = run(tx, tree(0), steps=2)
    names = frozenset(NAMES)
    found = moments(state, names)
    assert len(found) == count
    same = with_moments(state, names, found)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), same, state)))
    zeros = with_moments(state, names, [{n: jnp.zeros_like(a) for n, a in part.items()} for part in found])
    assert not any(np.asarray(a).any() for part in moments(zeros, names) for a in part.values())
    if name == "adamw":  # mu, then nu
        assert np.allclose(found[0][NAMES[3]], 0.1 * (0.9 * tree(10)[NAMES[3]] + tree(11)[NAMES[3]]), atol=1e-6)
        assert (found[1][NAMES[3]] >= 0).all()
