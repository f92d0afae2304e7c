"""Learned gates: the distribution, the constraint, the expectation, and baking; latency tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Gate, Loss, Site, Term, arrays, describe, flatten, trained_names
from jaxlm.methods.prune.structured import latency
from jaxlm.methods.prune.structured.gates import open_gates
from jaxlm.methods.prune.structured.hard_concrete import HardConcrete
from jaxlm.methods.prune.structured.l0 import deterministic_gates, expected_latency, expected_size, l0, open_shares
from jaxlm.methods.prune.structured.latency import Curve, Table, grid, measure, table_at
from jaxlm.methods.prune.structured.shrink import shrink
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.train.gradient import gradient
from jaxlm.train.optimizer import optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import create_state, dropout_key, make_step

pytestmark = pytest.mark.slow


def test_open_as_often_as_expected():
    """Monte Carlo against P(z > 0), and P(z = 1) by symmetry of the stretched interval."""
    gate = HardConcrete(jnp.array([-3.0, -1.0, 0.0, 2.0]), speed=1.5)
    draws = jax.vmap(lambda key: gate.open(Context(key=key)))(jax.random.split(jax.random.key(0), 40_000))
    assert float(draws.min()) == 0.0 and float(draws.max()) == 1.0
    assert np.allclose((draws > 0).mean(0), gate.probability(), atol=0.01)
    closing = HardConcrete(-gate.score, speed=1.5)
    assert np.allclose((draws == 1).mean(0), 1 - closing.probability(), atol=0.01)


def test_a_deterministic_pass_by_hand():
    log_alpha = np.array([-4.0, -1.0, 0.0, 1.0, 4.0])
    expected = np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1)
    assert np.allclose(HardConcrete(jnp.array(log_alpha / 7), speed=7.0).open(Context()), expected, atol=1e-6)


def test_the_gradient_is_that_of_log_alpha():
    """Whatever the speed: one that was larger would take up the whole norm where gradients are clipped."""
    gate = HardConcrete(jnp.array([-0.5, 0.25]), speed=8.0)
    value, pull = jax.vjp(lambda score: gate.replace(score=score).log_alpha, gate.score)
    assert value.tolist() == [-4.0, 2.0] and pull(jnp.ones(2))[0].tolist() == [1.0, 1.0]


def learned(tools, name, kinds, seed=0):
    """A model with random learned gates."""
    gated = open_gates(tools.lm_of(name), kinds, make=lambda ones: HardConcrete(ones, 2.0))
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    draw = lambda path, leaf: (  # noqa: E731
        leaf.replace(score=1.5 * jax.random.normal(next(keys), leaf.score.shape)) if isinstance(leaf, Site) else leaf
    )
    return tools.change_leaves(gated, draw)


@pytest.mark.parametrize("name", ["GQA", "MQA", "T5"])
def test_expected_size_is_the_mean_size(name, tools):
    """Sizes of arrays under independently drawn gates, averaged; the same in both views."""
    kinds = ("heads", "ffn", "layers")
    gated = learned(tools, name, kinds)
    flat, size_of = flatten(gated.params), expected_size(gated.params, gated.axes)
    expected = float(size_of(open_shares(gated.params)))
    gates = {path: np.asarray(leaf.probability()) for path, leaf in flat.items() if isinstance(leaf, Site)}
    rng, whole, sizes = np.random.default_rng(0), 0, np.zeros(20_000)
    shares = {path: (rng.random((20_000, *p.shape)) < p).reshape(20_000, -1).mean(1) for path, p in gates.items()}
    for path, leaf in flat.items():
        if "layers_" not in path or isinstance(leaf, Site):
            continue
        size, layer = float(leaf.size), path.split("layers_")[0] + "layers_" + path.split("layers_")[1].split("/")[0]
        names = str(gated.axes[path])
        cut = shares[f"{layer}/gate"]
        if "ffn" in names:
            cut = cut * shares[f"{layer}/mlp/gate"]
        if ("q_per_kv" if name == "MQA" else "kv_heads") in names:
            cut = cut * shares[path.split("attention/")[0] + "attention/gate"]
        whole, sizes = whole + size, sizes + size * cut
    assert np.isclose(expected, sizes.mean() / whole, atol=3e-3)
    assert np.isclose(expected, float(size_of(open_shares(gated.network.run_view(gated.params)))), atol=1e-6)


def test_expected_size_counts_what_gates_can_remove(tools):
    """All closed but one unit in twelve: a twelfth of the FFN is left. The stream's width enters a matrix once."""
    lm = tools.lm_of("MHA")
    gated = open_gates(lm, ("ffn",), make=lambda ones: HardConcrete(ones))
    size = expected_size(gated.params, gated.axes)
    assert np.isclose(float(size({path: jnp.float32(1 / 12) for path in open_shares(gated.params)})), 1 / 12)
    gated = open_gates(lm, ("hidden",), make=lambda ones: HardConcrete(ones))
    assert np.isclose(float(expected_size(gated.params, gated.axes)({"hidden": jnp.float32(0.25)})), 0.25)


@pytest.mark.parametrize("name", ["GQA", "T5", "post-norm"])
def test_baked_is_what_was_evaluated(name, tools, tmp_path):
    gated = learned(tools, name, ("heads", "ffn", "layers", "hidden"))
    method = l0(size=0.5, end=2, targets=("heads", "ffn", "layers", "hidden"))
    settled = method.eval_params(gated.params, {})
    expected = tools.logits(gated.replace(params=settled))
    assert any(
        0 < v < 1 for leaf in flatten(settled).values() if isinstance(leaf, Gate) for v in leaf.value.reshape(-1)
    )
    run = flatten(deterministic_gates(gated.network.run_view(gated.params)))
    for path, leaf in flatten(settled).items():
        if isinstance(leaf, Gate) and path.endswith("layers_1/mlp/gate"):
            assert np.array_equal(run[path.replace("layers_1", "layers_0-1")].value[1], leaf.value)
    small = method.bake(gated, {})
    tools.check_structure(small)
    assert np.abs(tools.logits(small) - expected).max() <= 1e-5
    again = method.bake(small, {})
    assert again.config == small.config
    assert all(np.array_equal(a, arrays(small.params)[n]) for n, a in arrays(again.params).items())


def train(tools, method, steps, learning_rate=0.01):
    """Training of a tiny model to keep its logits, with a method: states by step, and logs."""
    lm = tools.lm_of("MHA")
    network, batch = lm.network, tools.batch_of(lm)
    target = jax.jit(network.forward)(lm.params, batch)["logits"]

    def fn(params, constants, batch, ctx):
        error = network.forward(params, batch, ctx=ctx)["logits"] - target
        return {"squares": Term(jnp.sum(jnp.square(error)), jnp.float32(error.size))}, {}

    loss = method.loss(Loss(fn))
    start = method.init(jax.random.key(0), lm)
    view = network.run_view(start.lm.params)
    infos = describe(view)
    trained = trained_names(infos, [method.trainable])
    settings = TrainSettings(steps=steps, learning_rate=learning_rate, schedule="constant")
    tx = optimizer(settings, steps, {name: infos[name] for name in trained})
    step = jax.jit(make_step(gradient(loss, trained), tx, method, trained, ctx=Context(), largest_norm=0.0))
    state, logs = create_state(dropout_key(0), view, {}, tx, trained), []
    for _ in range(steps):
        state, log = step(state, start.constants, batch)
        logs.append({name: float(term[0]) for name, term in log["terms"].items()})
    return state, logs


def test_the_constraint_reaches_its_target(tools):
    method = l0(size=0.5, end=100, speed=10.0)
    state, logs = train(tools, method, 300)
    assert logs[0]["l0_left"] > 0.95
    assert abs(np.mean([log["l0_left"] for log in logs[-20:]]) - 0.5) < 0.03
    settled = flatten(method.eval_params(state.params, {}))["layers_0-2/mlp/gate"].value
    for i in range(3):  # evaluation closes as many as were expected to be
        assert abs(np.mean(settled[i] > 0) - float(open_shares(state.params)[f"layers_{i}/mlp/gate"])) < 0.1
    assert float(state.params["l0"]["constraint"].target) == 0.5


# Latency --------------------------------------------------------------------------------------------------------------


def table_of(heads, ffn):
    return Table(1.0, Curve((1, 2, 4), heads), Curve((1, 6, 12), ffn), {})


def test_expected_latency_by_hand(tools):
    lm = tools.lm_of("MHA")  # three layers of 4 heads and 12 units
    gated = open_gates(lm, ("heads", "ffn", "layers"), make=lambda ones: HardConcrete(ones))
    left = expected_latency(gated.params, gated.config, table_of((0.0, 1.0, 3.0), (0.0, 2.0, 6.0)))
    shares = {path: jnp.ones(()) for path in open_shares(gated.params)}
    assert float(left(shares)) == 1.0
    shares |= {"layers_0/attention/gate": jnp.float32(0.75), "layers_1/mlp/gate": jnp.float32(0.5)}
    shares |= {"layers_2/gate": jnp.float32(0.1)}
    assert np.isclose(float(left(shares)), ((1 + 2 + 6) + (1 + 3 + 2) + 0.1 * 10) / 30)


def test_what_costs_more_time_is_closed_first(tools, tmp_path, monkeypatch):
    """Units that cost nothing stay; heads carry the whole target."""
    table = table_of((0.0, 1.0, 3.0), (0.0, 0.0, 0.0))
    measure_nothing = lambda network, b, t: table._replace(of=latency.describe(network, b, t))  # noqa: E731
    monkeypatch.setattr(latency, "measure", measure_nothing)
    method = l0(latency=0.6, table=str(tmp_path / "t.json"), length=8, end=80, speed=10.0)
    state, logs = train(tools, method, 300)
    assert abs(np.mean([log["l0_left"] for log in logs[-20:]]) - 0.6) < 0.04
    shares = open_shares(state.params)
    heads, units = (np.mean([s for path, s in shares.items() if kind in path]) for kind in ("attention", "mlp"))
    assert units > 0.9 > 0.7 > heads


def test_a_table_is_measured_once_and_kept(tools, tmp_path):
    network = tools.lm_of("MQA").network
    table = measure(network, 2, 6, points=2, rounds=2)
    assert table.heads.counts == (1, 4) and table.ffn.counts == (1, 12) and table.layer > 0
    assert min(*table.heads.seconds, *table.ffn.seconds) >= 0 == table.heads.seconds[0]
    path = tmp_path / "sub" / "table.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**table._asdict(), "heads": list(table.heads), "ffn": list(table.ffn)}))
    assert table_at(str(path), network, 2, 6) == table
    with pytest.raises(ValueError, match="was measured with length 6, here it is 7"):
        table_at(str(path), network, 2, 7)


def test_a_table_is_written_where_there_is_none(tools, tmp_path, monkeypatch):
    network = tools.lm_of("MHA").network
    table = table_of((0.0, 1.0, 3.0), (0.0, 2.0, 6.0))._replace(of=latency.describe(network, 1, 8))
    monkeypatch.setattr(latency, "measure", lambda *_: table)
    path = str(tmp_path / "sub" / "table.json")
    tables = [table_at(path, network, 1, 8)]
    jax.eval_shape(lambda x: tables.append(table_at(path, network, 1, 8)) or x, jnp.ones(2))
    assert tables == [table, table]
    with pytest.raises(ValueError, match="an encoder-decoder has two lengths"):
        table_at(path, tools.lm_of("T5").network, 1, 8)


def test_grids_end_at_the_ends():
    assert grid(1, 6) == (1,) and grid(3, 6) == (1, 2, 3) and grid(1536, 6)[-1] == 1536


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of size and latency"),
        ({"size": 0.5, "latency": 0.5}, "exactly one of size and latency"),
        ({"size": 0.0}, "the share that stays"),
        ({"size": 0.5, "targets": ("head",)}, "did you mean 'heads'"),
        ({"latency": 0.5}, "needs table="),
        ({"latency": 0.5, "table": "t.json", "targets": ("hidden",)}, "knows no hidden width"),
        ({"size": 0.5, "begin": 9}, "steps begin=9"),
    ],
)
def test_l0_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        l0(**{"end": 5, **options})


def test_codes_are_refused_before_training(tools):
    lm = quantize(tools.lm_of("MHA"))
    with pytest.raises(ValueError, match=r"l0: layers_0/attention/output/kernel holds codes.*prune, then quantize"):
        l0(size=0.5, end=2).init(jax.random.key(0), lm)


def test_gates_that_still_learn_are_not_shrunk(tools):
    gated = learned(tools, "MHA", ("ffn",))
    with pytest.raises(ValueError, match="layers_0/mlp/gate holds a HardConcrete, which is still learning"):
        shrink(gated)
