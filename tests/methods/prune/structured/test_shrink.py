"""The law of the chapter: a shrunk model computes what the gated one did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Gate, LowRank, Masked, Quantized, flatten, map_leaves, unflatten
from jaxlm.io.pretrained import LM, save
from jaxlm.methods.prune.structured.gates import open_gates, prune
from jaxlm.methods.prune.structured.shrink import shrink
from jaxlm.methods.prune.structured.slicing import cut
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.models import FAMILIES as MODEL_FAMILIES

FAMILIES = ("MHA", "GQA", "MQA", "post-norm", "T5")


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_units(name, tools, tmp_path):
    model, params = tools.model_of(name)
    opened, axes = open_gates(model, params, model.axes(), ("heads", "ffn"))
    assert np.array_equal(tools.logits(model, opened), tools.logits(model, params)), "an open gate changes nothing"
    closed = tools.random_gates(opened, seed=len(name))
    assert np.abs(tools.logits(model, closed) - tools.logits(model, params)).max() > 1e-2
    small, _, _ = tools.check_law(model, closed, axes, tmp_path)
    assert sum(small.config.ffn_size) < sum(model.config.ffn_size)
    assert sum(small.config.num_heads) < sum(model.config.num_heads)
    if name == "T5":
        assert sum(small.config.cross_num_heads) < 8 and sum(small.config.decoder_num_heads) < 8


@pytest.mark.parametrize("name", ("GQA", "MQA"))
@pytest.mark.parametrize("seed", (0, 1))
def test_query_heads_of_groups(name, seed, tools, tmp_path):
    """Every KV group that stays keeps as many query heads, each its own."""
    model, params = tools.model_of(name)
    params, axes = open_gates(model, params, model.axes(), ("queries", "ffn"))
    tools.check_law(model, tools.random_gates(params, seed), axes, tmp_path)


@pytest.mark.parametrize("name", (*FAMILIES, "pair", "classes"))
def test_hidden_width(name, tools, tmp_path):
    """Norms take their means over what is left; T5's output scale stays that of the old width."""
    model, params = tools.model_of(name)
    opened, axes = open_gates(model, params, model.axes(), ("hidden",))
    assert np.abs(tools.logits(model, opened) - tools.logits(model, params)).max() <= 1e-5
    closed = dict(opened)
    closed["hidden"] = Gate(jnp.ones(16).at[jnp.array([0, 3, 4, 9, 15])].set(0.0))
    small, _, _ = tools.check_law(model, closed, axes, tmp_path)
    assert small.config.hidden_size == 11 and small.config.head_dim == model.config.head_dim


@pytest.mark.parametrize("name", (*FAMILIES, "classes", "windows", "late windows", "shifted positions"))
def test_everything_at_once(name, tools, tmp_path):
    model, params = tools.model_of(name)
    kinds = ("queries" if name == "GQA" else "heads", "ffn", "hidden", "layers")
    params, axes = open_gates(model, params, model.axes(), kinds)
    stacks = ("encoder/", "decoder/") if name == "T5" else ("",)
    closed = flatten(tools.random_gates(params, seed=5))
    for stack in stacks:
        for i in range(model.config.num_layers):
            closed[f"{stack}layers_{i}/gate"] = Gate(jnp.float32(i != 0))
    small, _, _ = tools.check_law(model, unflatten(closed), axes, tmp_path)
    assert small.config.num_layers == model.config.num_layers - 1 and small.config.hidden_size < 16


def low_rank(path, leaf):
    a, b = (
        jax.random.normal(jax.random.key(s), shape) for s, shape in ((1, (leaf.shape[0], 2)), (2, (2, leaf.shape[1])))
    )
    return LowRank(leaf, 0.1 * a, b, scale=0.5)


WRAP = {
    "Masked": lambda path, leaf: Masked(leaf, jax.random.bernoulli(jax.random.key(3), 0.7, leaf.shape)),
    "Quantized": lambda path, leaf: Quantized.of(leaf),
    "dynamic": lambda path, leaf: Quantized.of(leaf, dynamic=True),
    "LowRank": low_rank,
    "LowRank(Quantized)": lambda path, leaf: low_rank(path, Quantized.of(leaf)),
}


@pytest.mark.parametrize("wrap", WRAP)
def test_weights_are_cut_in_every_field(wrap, tools, tmp_path):
    model, params = tools.model_of("GQA")
    params, axes = open_gates(model, params, model.axes(), ("heads", "ffn", "hidden"))
    params = map_leaves(lambda path, leaf: WRAP[wrap](path, leaf) if "/kernel" in path else leaf, params)
    tools.check_law(model, tools.random_gates(params, seed=3), axes, tmp_path)


@pytest.mark.parametrize("name", ["MHA", "post-norm", "T5"])
def test_layers(name, tools, tmp_path):
    model, params = tools.model_of(name)
    params, axes = open_gates(model, params, model.axes(), ("layers",))
    shut = lambda path, leaf: Gate(jnp.float32("layers_0" not in path)) if isinstance(leaf, Gate) else leaf  # noqa: E731
    small, _, _ = tools.check_law(model, map_leaves(shut, params), axes, tmp_path)
    assert small.config.num_layers == model.config.num_layers - 1


@pytest.mark.parametrize("name", ["MHA", "GQA", "T5"])
def test_half_open_heads_and_units_are_folded(name, tools, tmp_path):
    model, params = tools.model_of(name)
    params, axes = open_gates(model, params, model.axes(), ("queries" if name == "GQA" else "heads", "ffn"))
    half = lambda path, leaf: (  # noqa: E731
        Gate(leaf.value * jax.random.uniform(jax.random.key(len(path)), leaf.value.shape, minval=0.3))
        if isinstance(leaf, Gate)
        else leaf
    )
    closed = map_leaves(half, tools.random_gates(params, seed=2))
    tools.check_law(model, closed, axes, tmp_path)
    wrapped = map_leaves(lambda path, leaf: low_rank(path, leaf) if "/kernel" in path else leaf, closed)
    tools.check_law(model, wrapped, axes, tmp_path)


@pytest.mark.parametrize("name", ["MQA", "T5"])
def test_pruning_twice(name, tools, tmp_path):
    """A ragged or already renumbered model is pruned like any other."""
    model, params = tools.model_of(name)
    axes = model.axes()
    for share in (0.25, 0.34):
        model, params, axes = tools.check_law(
            model, *tools.closed(model, params, axes, ("heads", "ffn", "hidden"), share), tmp_path
        )
    assert set(model.config.num_heads) == {2}
    assert set(model.config.num_kv_heads) == {{"MQA": 1}.get(name, 2)}
    assert set(model.config.ffn_size) == {6} and model.config.hidden_size == 8


def test_every_family_is_among_the_models(tools):
    assert {family for family, _ in tools.models.values()} == MODEL_FAMILIES.keys()


def test_a_ragged_model_is_pruned_again(tools, tmp_path):
    model, params = tools.model_of("GQA")
    for seed in (1, 2):
        params, axes = open_gates(model, params, model.axes(), ("heads", "ffn", "hidden"))
        model, params, _ = tools.check_law(model, tools.random_gates(params, seed), axes, tmp_path)
    assert len(set(model.config.ffn_size)) > 1


def test_the_columns_of_t5_that_nobody_reads_go_too(tools, tmp_path):
    """Every head then reads its own of those that stay, as in transformers."""
    model, params = tools.model_of("T5")
    params, axes = open_gates(model, params, model.axes(), ("heads",))
    open_ = jnp.array([0.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1)
    params = map_leaves(lambda path, leaf: Gate(open_) if isinstance(leaf, Gate) else leaf, params)
    small, little, _ = shrink(model, params, axes)
    assert small.config.position_heads is small.config.decoder_position_heads is None
    assert save(LM(small.config, little), tmp_path / "small") is None
    table = "encoder/relative_positions/embedding"
    assert np.array_equal(flatten(little)[table], flatten(params)[table][:, [1, 3]])


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "path", "size"), [("layers", "layers_1/gate", ()), ("hidden", "hidden", (16,))])
def test_half_closed_gates_are_refused_where_nothing_can_take_the_factor(kind, path, size, tools):
    model, params = tools.model_of("MHA")
    params, axes = open_gates(model, params, model.axes(), (kind,))
    params = unflatten(flatten(params) | {path: Gate(jnp.full(size, 0.5))})
    with pytest.raises(ValueError, match=rf"{path}: a gate must be 0 or 1"):
        shrink(model, params, axes)


def test_half_closed_gates_before_codes_are_refused(tools):
    model, params = tools.model_of("MHA")
    _, params, axes = quantize(model, params, model.axes())
    params, axes = open_gates(model, params, axes, ("ffn",))
    params["layers_1"]["mlp"]["gate"] = Gate(jnp.full(12, 0.5))
    with pytest.raises(ValueError, match="layers_1/mlp/down/kernel: half-open gates cannot be folded into the codes"):
        shrink(model, params, axes)


def test_unequal_query_heads_are_refused(tools):
    model, params = tools.model_of("GQA")
    params, axes = open_gates(model, params, model.axes(), ("queries",))
    params["layers_0"]["attention"]["gate"] = Gate(jnp.ones((4, 2, 1)).at[2, 1].set(0.0))
    with pytest.raises(ValueError, match=r"KV groups keep \[2, 2, 1, 2\] query heads"):
        shrink(model, params, axes)


def test_closing_every_layer_is_refused(tools):
    model, params = tools.model_of("MHA")
    params, axes = open_gates(model, params, model.axes(), ("layers",))
    shut = lambda path, leaf: Gate(jnp.float32(0)) if isinstance(leaf, Gate) else leaf  # noqa: E731
    with pytest.raises(ValueError, match="at least one must stay"):
        shrink(model, map_leaves(shut, params), axes)


def test_storage_that_does_not_follow_the_axis_is_refused():
    with pytest.raises(ValueError, match="here: ArrayImpl stores 3 entries along a x b, which are 6"):
        cut(jnp.ones((3, 2)), (("a", "b"), None), ((2, 3), (2,)), {"b": np.array([0])}, "here")
    with pytest.raises(ValueError, match="here: ArrayImpl stores 3 entries along a, which are 6"):
        cut(jnp.ones((3, 2)), ("a", None), ((6,), (2,)), {"a": np.array([0])}, "here")


def test_quantized_after_pruning_is_pruned_before_quantizing(tools):
    """The two orders give the same codes for columns that stay whole."""
    model, params = tools.model_of("MHA")
    first, a, _ = quantize(*prune(model, params, model.axes(), ffn=0.25), dynamic=False)
    second, b, _ = prune(*quantize(model, params, model.axes(), dynamic=False), ffn=0.25)
    assert first == second
    up = [np.asarray(flatten(tree)["layers_0/mlp/up/kernel"].codes) for tree in (a, b)]
    assert up[0].shape == up[1].shape == (16, 9)
