"""The driver: what a rule sees, in which order, and what is refused."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Calibration, InputScaled, SurgeryContext, flatten, map_leaves, unflatten
from jaxlm.io.lm import LM
from jaxlm.methods.calibration import Statistics, calibrate, matrix, per_leaf
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.unstructured.sparsegpt import sparsegpt
from jaxlm.methods.prune.unstructured.wanda import wanda
from jaxlm.models import model_config
from jaxlm.nn.dense import norm

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "ffn_size": 12, "num_heads": 4}
MODELS = {
    "gpt2": {"max_positions": 8},
    "llama": {"num_kv_heads": 2},
    "bert": {"max_positions": 8},
    "t5": {"gated": True},
}
every = pytest.mark.parametrize("family", MODELS)
MASK = (np.arange(6) < np.array([[6], [4], [0]])).astype(np.int32)


@functools.cache
def lm_of(family):
    """A model whose biases and norms are random too."""
    lm = LM.initialize(model_config(family, **SIZES, **MODELS[family]), jax.random.key(0))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return lm.replace(params=map_leaves(noise, lm.params))


def batches(family, seed=0):
    """Two batches of three rows, the last of them all padding."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(2):
        batch = {"input_ids": rng.integers(1, 19, MASK.shape) * MASK, "attention_mask": MASK}
        if family == "t5":
            batch |= {"decoder_input_ids": rng.integers(1, 19, (3, 5)), "decoder_attention_mask": MASK[:, 1:]}
        drawn.append(batch)
    return drawn


def context_of(batches):
    """The context of a surgery that calibrates with these batches."""
    return SurgeryContext(read_calibration=lambda lm: Calibration(batches, "somewhere"))


# What a rule sees -----------------------------------------------------------------------------------------------------

ORDER = {
    "gpt2": ["attention/query key value", "attention/output", "mlp/up", "mlp/down"],
    "bert": ["attention/query key value", "attention/output", "mlp/up", "mlp/down"],
    "llama": ["attention/query key value", "attention/output", "mlp/gate_proj up", "mlp/down"],
}
CROSS = ["cross_attention/query", "cross_attention/key value", "cross_attention/output"]


@every
def test_groups_come_in_the_order_of_the_data(family):
    lm = lm_of(family)
    seen = []

    def rule(group):
        part = next(iter(group.kernels)).split("/")[0]
        seen.append((group.layer, part + "/" + " ".join(name.split("/")[1] for name in group.kernels), group.norm))
        assert group.chosen == tuple(group.kernels)
        return {}

    unchanged = calibrate(lm, context_of(batches(family)), rule, who="test")
    old, new = flatten(lm.params), flatten(unchanged.params)
    assert unchanged.config is lm.config and new.keys() == old.keys()
    assert all(a is b for a, b in zip(new.values(), old.values(), strict=True))
    if family == "t5":
        groups = {"encoder/": ORDER["llama"], "decoder/": [*ORDER["llama"][:2], *CROSS, *ORDER["llama"][2:]]}
    else:
        groups = {"": ORDER[family]}
    expected = [(f"{side}layers_{i}", name) for side, names in groups.items() for i in range(2) for name in names]
    assert [entry[:2] for entry in seen] == expected
    folded = {name for _, name, norm in seen if norm}
    assert folded == set() if family == "bert" else "attention/query key value" in folded and "mlp/down" not in folded
    assert "cross_attention/key value" not in folded


@every
def test_statistics_are_those_of_the_valid_tokens(family):
    """By hand for the first product, whose input is the (normed) embedding."""
    lm = lm_of(family)
    first_of_layer = {}

    def rule(group):
        first_of_layer.setdefault(group.layer, group.statistics)
        return {}

    calibrate(lm, context_of(batches(family)), rule, who="test", hessian=True)
    side, stack = ("encoder/", lm.params["encoder"]) if family == "t5" else ("", lm.params)
    inputs = []
    for batch in batches(family):
        x = lm.network.embed(lm.params, batch, side).x
        if lm.config.pre_norm:
            x = norm(lm.config.norm, stack["layers_0"]["attention_norm"], x, lm.config.norm_eps)
        inputs.append(np.asarray(x, np.float64)[MASK > 0])
    x = np.concatenate(inputs)
    statistics = first_of_layer[f"{side}layers_0"]
    assert len(x) == statistics.tokens == 20
    assert np.allclose(statistics.hessian, x.T @ x, rtol=1e-5, atol=1e-5)
    assert np.allclose(statistics.norm, np.linalg.norm(x, axis=0), rtol=1e-5)
    assert np.allclose(statistics.mean, np.abs(x).mean(0), rtol=1e-5)
    assert np.allclose(statistics.largest, np.abs(x).max(0), rtol=1e-5)


def test_a_cross_attention_reads_the_encoders_tokens():
    tokens = {}

    def rule(group):
        if group.layer == "decoder/layers_1":
            tokens[next(iter(group.kernels)).removesuffix("/kernel")] = int(group.statistics.tokens)
        return {}

    calibrate(lm_of("t5"), context_of(batches("t5")), rule, who="test")
    assert tokens.pop("cross_attention/key") == 20  # 6 + 4 tokens a batch
    assert set(tokens.values()) == {16}  # 5 + 3


@every
def test_every_group_sees_what_was_changed_before_it(family):
    """A rule that zeroes everything: each group then reads what a model without the ones before it gives."""
    lm, context = lm_of(family), context_of(batches(family))
    sums_on_the_way = {}

    def zero(group):
        name = next(iter(group.kernels))
        sums_on_the_way[f"{group.layer}/{name}"] = float(group.statistics.absolute.sum())
        return {name: jnp.zeros_like(leaf) for name, leaf in group.kernels.items()}

    changed = flatten(calibrate(lm, context, zero, who="test").params)
    flat, sums = flatten(lm.params), {}

    def record(group):
        sums[f"{group.layer}/{next(iter(group.kernels))}"] = float(group.statistics.absolute.sum())
        return {}

    # The same input, from a model in which only what comes before is zero.
    for first_kernel in list(sums_on_the_way)[1:6]:
        before = list(sums_on_the_way)[: list(sums_on_the_way).index(first_kernel)]
        zeroed = {p: jnp.zeros_like(a) if _comes_before(p, before) else a for p, a in flat.items()}
        calibrate(lm.replace(params=unflatten(zeroed)), context, record, who="test")
        assert np.isclose(sums[first_kernel], sums_on_the_way[first_kernel], rtol=1e-5), first_kernel
    assert not any(np.asarray(a).any() for p, a in changed.items() if p.endswith("kernel") and "layers_" in p)


def _comes_before(path, before):
    """Whether a kernel belongs to one of the groups that were done before."""
    shared = {"attention/query": "attention/key value", "mlp/gate_proj": "mlp/up", "cross_attention/key": "value"}
    names = set(before)
    for first in before:
        layer, _, product = first.removesuffix("/kernel").rpartition("layers_")
        number, _, product = product.partition("/")
        for other in shared.get(product, "").split():
            parent = product.split("/")[0]
            names.add(f"{layer}layers_{number}/{other if '/' in other else f'{parent}/{other}'}/kernel")
    return path in names


def test_only_targets_are_chosen_and_the_rest_is_left():
    seen = []

    def rule(group):
        seen.append((group.layer, sorted(group.chosen)))
        return {}

    context = context_of(batches("llama"))
    calibrate(lm_of("llama"), context, rule, who="test", targets=r"layers_1/.*/(up|value)/kernel")
    assert seen == [("layers_1", ["attention/value/kernel"]), ("layers_1", ["mlp/up/kernel"])]


def test_below_scaled_inputs_the_base_is_changed_with_the_statistics_of_the_scaled():
    scale = jnp.array([2.0, -1.0])
    x = jax.random.normal(jax.random.key(0), (5, 2))
    received = []

    def change(path, leaf, statistics):
        received.append(statistics)
        return 2 * leaf

    class Group:
        layer, chosen = "layers_0", ("up",)
        kernels = {"up": InputScaled(jnp.ones((2, 3)), scale)}
        statistics = Statistics.of(x, jnp.ones(5, bool), hessian=True)

    leaf = per_leaf(change)(Group)["up"]
    assert isinstance(leaf, InputScaled) and np.array_equal(leaf.base, np.full((2, 3), 2.0))
    expected = Statistics.of(x * scale, jnp.ones(5, bool), hessian=True)
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(received[0], expected, strict=True))


def test_statistics_add_up():
    x, y = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (4, 3))
    both = Statistics.of(jnp.concatenate([x, y]), jnp.ones(9, bool), hessian=True)
    parts = Statistics.of(x, jnp.ones(5, bool), True).add(Statistics.of(y, jnp.ones(4, bool), True))
    assert all(np.allclose(a, b, rtol=1e-6) for a, b in zip(both, parts, strict=True))


# What is refused ------------------------------------------------------------------------------------------------------


def nothing(group):
    return {}


def refused(message, data=None, rule=nothing, **options):
    context = context_of(batches("gpt2") if data is None else data)
    with pytest.raises(ValueError, match=message):
        calibrate(lm_of("gpt2"), context, rule, who="wanda", **options)


def test_targets_that_match_nothing_or_lie_outside():
    refused("wanda: targets: the rule 'x' matches no parameter", targets="x")
    refused("wanda: targets '.*' match embed/tokens/embedding", targets=".*")


def test_layers_that_are_shared():
    lm = lm_of("gpt2")
    shared = lm.replace(params={name: tree for name, tree in lm.params.items() if name != "layers_1"})
    with pytest.raises(ValueError, match="wanda: layers_1 shares the parameters of another layer"):
        calibrate(shared, context_of(batches("gpt2")), nothing, who="wanda")


def test_no_token_at_all():
    empty = [{**batch, "attention_mask": 0 * MASK} for batch in batches("gpt2")]
    refused("wanda: the calibration data hold no token that layers_0/attention/query", data=empty)
    refused("wanda: the calibration data hold no row", data=())


def test_inputs_that_are_not_finite_are_named():
    def rule(group):
        return {"mlp/up/kernel": jnp.full((16, 12), jnp.inf)} if "mlp/up/kernel" in group.kernels else {}

    refused("wanda: the inputs of layers_0/mlp/down/kernel are not finite", rule=rule)


def test_weights_that_have_parts_are_named():
    leaf = LowRank(jnp.ones((4, 4)), jnp.ones((4, 1)), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match=r"gptq: layers_0/mlp/up/kernel is a LowRank; .* bake it first"):
        matrix("gptq", "layers_0/mlp/up/kernel", leaf)


@pytest.mark.parametrize("surgery", [wanda, sparsegpt])
def test_shares_by_rules(surgery):
    """Each matrix has the share of the first rule that matches it; what no rule matches is an error."""
    lm, context = lm_of("gpt2"), context_of(batches("gpt2"))
    rules = ((r".*mlp/up/kernel", 0.25), (r".*", 0.5))
    flat = flatten(surgery(lm, context, sparsity=rules).params)
    for path in ("layers_0/mlp/up/kernel", "layers_1/mlp/down/kernel"):
        left = float(np.mean(np.asarray(flat[path].mask)))
        assert left == pytest.approx(0.75 if "up" in path else 0.5, abs=0.05)
    with pytest.raises(ValueError, match="no sparsity rule matches"):
        surgery(lm, context, sparsity=rules[:1])
