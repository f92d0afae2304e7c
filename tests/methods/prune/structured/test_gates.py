"""Which entries close: exact numbers, budgets, both views; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import FakeQuant, Gate, SurgeryContext, chain, flatten
from jaxlm.core.paths import canonical_path
from jaxlm.methods.prune.structured.gates import choose, close_gates, how_many, open_gates, prune, structured
from jaxlm.methods.prune.structured.scores import magnitude_of


def test_exactly_as_many_as_asked_for_and_one_always_stays():
    for size in (1, 5, 12):
        for share in (0.0, 0.1, 0.34, 0.5, 0.99):
            assert int(how_many(size, share)) == max(1, size - round(share * size))
            kept = int(how_many(size, share, multiple=4))
            assert kept == size or (kept % 4 == 0 and kept >= max(1, size - round(share * size)))


def test_a_global_budget_ranks_layers_together():
    """Rows are normed, so their scale does not matter; the exact number closes, and every row keeps its best."""
    rng = np.random.default_rng(0)
    scores = {"a": jnp.array(rng.random((2, 6))), "b": jnp.array(1e-3 * rng.random(6) ** 8)}
    open_ = {k: np.asarray(v) for k, v in choose(scores, {"a": 0.5, "b": 0.5}, "global").items()}
    assert sum(mask.sum() for mask in open_.values()) == 9
    normed = np.concatenate(
        [np.asarray(s / jnp.linalg.norm(s, axis=-1, keepdims=True)).reshape(-1) for s in scores.values()]
    )
    mask = np.concatenate([m.reshape(-1) for m in open_.values()])
    best = np.concatenate([np.asarray(s == s.max(-1, keepdims=True)).reshape(-1) for s in scores.values()])
    assert mask[best].all() and normed[mask & ~best].min() >= normed[~mask].max()
    assert open_["b"].sum() < 3, "few units carry this row"


def test_a_global_budget_in_multiples():
    scores = {"a": jax.random.uniform(jax.random.key(0), (3, 16))}
    counts = np.asarray(choose(scores, {"a": 0.5}, "global", multiple=4)["a"].sum(-1))
    assert (counts % 4 == 0).all() and 24 <= counts.sum() <= 24 + 9


def test_the_least_important_go_first(tools):
    lm = tools.lm_of("GQA")
    flat = flatten(lm.params)
    for i, head in enumerate((2, 0)):
        path = f"layers_{i}/attention/output/kernel"
        flat[path] = flat[path].at[8 * head : 8 * (head + 1)].multiply(1e-3)
        path = f"layers_{i}/mlp/down/kernel"
        flat[path] = flat[path].at[jnp.array([1, 5, 7])].multiply(1e-3)
    closed = flatten(tools.closed(tools.set_leaves(lm, flat), ("heads", "ffn"), 0.25).params)
    for i, head in enumerate((2, 0)):
        assert np.flatnonzero(closed[f"layers_{i}/attention/gate"].value == 0).tolist() == [head]
        assert np.flatnonzero(closed[f"layers_{i}/mlp/gate"].value == 0).tolist() == [1, 5, 7]


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_gates_close_the_same_in_both_views(budget, tools):
    gated = open_gates(tools.lm_of("MQA"), ("heads", "ffn", "hidden"))
    shares = {"heads": 0.5, "ffn": 0.3, "hidden": 0.25}
    canonical, stacked = (
        flatten(close_gates(params, magnitude_of(params, gated.axes), shares, budget))
        for params in (gated.params, gated.network.run_view(gated.params))
    )
    for path, leaf in stacked.items():
        if isinstance(leaf, Gate):
            for i in range(2):
                gate = canonical[canonical_path(path).replace("layers_0", f"layers_{i}")]
                assert np.array_equal(leaf.value if path == "hidden" else leaf.value[i], gate.value)
    assert canonical["layers_1/attention/gate"].value.shape == (1, 4, 1) and canonical["hidden"].value.sum() == 12


def test_shares_a_layer(tools):
    small = prune(tools.lm_of("T5"), ffn=(0.0, 0.5, 0.25, 0.75), heads=0.5)
    assert small.config.ffn_size == (12, 6) and small.config.decoder_ffn_size == (9, 3)
    assert small.config.num_heads == small.config.cross_num_heads == (2, 2)


def test_queries_of_every_group(tools):
    small = prune(tools.lm_of("GQA"), queries=0.5)
    assert small.config.num_kv_heads == (4, 4) and small.config.num_heads == (4, 4)


def test_one_always_stays(tools):
    small = prune(tools.lm_of("MHA"), heads=0.99, ffn=0.99, hidden=0.99)
    assert set(small.config.num_heads) == {1} and set(small.config.ffn_size) == {1} and small.config.hidden_size == 1


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": 1.0}, r"the share of ffn must be in \[0, 1\), not 1.0"),
        ({"heads": (0.5, -0.1, 0.0)}, "the share of heads"),
        ({"ffn": (0.5, 0.5)}, "2 shares of ffn for 3 layers"),
        ({"heads": 0.5, "queries": 0.5}, "heads and queries at once"),
        ({"queries": 0.5}, "every group has a single one"),
        ({"ffn": 0.5, "budget": "ragged"}, "unknown budget 'ragged'"),
        ({"ffn": (0.1, 0.2, 0.3), "budget": "global"}, "need budget='uniform'"),
        ({"ffn": 0.5, "score": "tailor"}, "did you mean 'taylor'"),
        ({"ffn": 0.5, "score": "taylor"}, "set config.calibration"),
        ({"ffn": 0.5, "multiple": 0}, "multiple must be at least 1"),
    ],
)
def test_prune_refuses(options, message, tools):
    """With the context that a run without config.calibration gives: the task's loss alone."""
    with pytest.raises(ValueError, match=message):
        prune(tools.lm_of("MHA"), SurgeryContext(task_loss=tools.squares), **options)


def test_two_structured_prunings_are_refused(tools):
    twice = chain([("a", structured(ffn=0.5, end=2)), ("b", structured(ffn=0.2, heads=0.5, end=2))])
    with pytest.raises(ValueError, match="b and a both claim the width of layers_0/mlp"):
        twice.init(jax.random.key(0), tools.lm_of("MHA"))


@pytest.mark.parametrize("options", [{"ffn": 0.5}, {"hidden": 0.5}])
def test_quantization_aware_training_is_refused(options, tools):
    fake_quantized = lambda path, leaf: FakeQuant(leaf) if path.endswith("up/kernel") else leaf  # noqa: E731
    lm = tools.change_leaves(tools.lm_of("MHA"), fake_quantized)
    with pytest.raises(ValueError, match=r"layers_0/mlp/up/kernel is in quantization-aware training.*prune first"):
        structured(**options, end=2).init(jax.random.key(0), lm)
