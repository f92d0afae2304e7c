"""The law of the chapter: a shrunk model computes what the gated one did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Gate, Masked, Quantized, flatten
from jaxlm.io.pretrained import save
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.structured.gates import open_gates, prune
from jaxlm.methods.prune.structured.shrink import shrink
from jaxlm.methods.prune.structured.slicing import cut
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.models import FAMILIES as MODEL_FAMILIES

pytestmark = pytest.mark.slow

FAMILIES = ("MHA", "GQA", "MQA", "post-norm", "T5")


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_units(name, tools, tmp_path):
    lm = tools.lm_of(name)
    opened = open_gates(lm, ("heads", "ffn"))
    assert np.array_equal(tools.logits(opened), tools.logits(lm)), "an open gate changes nothing"
    closed = tools.random_gates(opened, seed=len(name))
    assert np.abs(tools.logits(closed) - tools.logits(lm)).max() > 1e-2
    small = tools.check_law(closed, tmp_path)
    assert sum(small.config.ffn_size) < sum(lm.config.ffn_size)
    assert sum(small.config.num_heads) < sum(lm.config.num_heads)
    if name == "T5":
        assert sum(small.config.cross_num_heads) < 8 and sum(small.config.decoder_num_heads) < 8


@pytest.mark.parametrize("name", ("GQA", "MQA"))
@pytest.mark.parametrize("seed", (0, 1))
def test_query_heads_of_groups(name, seed, tools, tmp_path):
    """Every KV group that stays keeps as many query heads, each its own."""
    gated = open_gates(tools.lm_of(name), ("queries", "ffn"))
    tools.check_law(tools.random_gates(gated, seed), tmp_path)


@pytest.mark.parametrize("name", (*FAMILIES, "pair", "classes"))
def test_hidden_width(name, tools, tmp_path):
    """Norms take their means over what is left; T5's output scale stays that of the old width."""
    lm = tools.lm_of(name)
    opened = open_gates(lm, ("hidden",))
    assert np.abs(tools.logits(opened) - tools.logits(lm)).max() <= 1e-5
    gate = Gate(jnp.ones(16).at[jnp.array([0, 3, 4, 9, 15])].set(0.0))
    small = tools.check_law(tools.set_leaves(opened, {"hidden": gate}), tmp_path)
    assert small.config.hidden_size == 11 and small.config.head_dim == lm.config.head_dim


@pytest.mark.parametrize("name", (*FAMILIES, "classes", "windows", "late windows", "shifted positions"))
def test_everything_at_once(name, tools, tmp_path):
    lm = tools.lm_of(name)
    gated = open_gates(lm, ("queries" if name == "GQA" else "heads", "ffn", "hidden", "layers"))
    stacks = ("encoder/", "decoder/") if name == "T5" else ("",)
    without_first = {
        f"{stack}layers_{i}/gate": Gate(jnp.float32(i != 0)) for stack in stacks for i in range(lm.config.num_layers)
    }
    closed = tools.set_leaves(tools.random_gates(gated, seed=5), without_first)
    small = tools.check_law(closed, tmp_path)
    assert small.config.num_layers == lm.config.num_layers - 1 and small.config.hidden_size < 16


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
    gated = open_gates(tools.lm_of("GQA"), ("heads", "ffn", "hidden"))
    wrapped = tools.change_leaves(gated, lambda path, leaf: WRAP[wrap](path, leaf) if "/kernel" in path else leaf)
    tools.check_law(tools.random_gates(wrapped, seed=3), tmp_path)


@pytest.mark.parametrize("name", ["MHA", "post-norm", "T5"])
def test_layers(name, tools, tmp_path):
    lm = tools.lm_of(name)
    shut = lambda path, leaf: Gate(jnp.float32("layers_0" not in path)) if isinstance(leaf, Gate) else leaf  # noqa: E731
    small = tools.check_law(tools.change_leaves(open_gates(lm, ("layers",)), shut), tmp_path)
    assert small.config.num_layers == lm.config.num_layers - 1


@pytest.mark.parametrize("name", ["MHA", "GQA", "T5"])
def test_half_open_heads_and_units_are_folded(name, tools, tmp_path):
    gated = open_gates(tools.lm_of(name), ("queries" if name == "GQA" else "heads", "ffn"))
    half = lambda path, leaf: (  # noqa: E731
        Gate(leaf.value * jax.random.uniform(jax.random.key(len(path)), leaf.value.shape, minval=0.3))
        if isinstance(leaf, Gate)
        else leaf
    )
    half_open = tools.change_leaves(tools.random_gates(gated, seed=2), half)
    tools.check_law(half_open, tmp_path)
    wrapped = tools.change_leaves(half_open, lambda path, leaf: low_rank(path, leaf) if "/kernel" in path else leaf)
    tools.check_law(wrapped, tmp_path)


@pytest.mark.parametrize("name", ["MQA", "T5"])
def test_pruning_twice(name, tools, tmp_path):
    """A ragged or already renumbered model is pruned like any other."""
    lm = tools.lm_of(name)
    for share in (0.25, 0.34):
        lm = tools.check_law(tools.closed(lm, ("heads", "ffn", "hidden"), share), tmp_path)
    assert set(lm.config.num_heads) == {2}
    assert set(lm.config.num_kv_heads) == {{"MQA": 1}.get(name, 2)}
    assert set(lm.config.ffn_size) == {6} and lm.config.hidden_size == 8


def test_every_family_is_among_the_models(tools):
    assert {family for family, _ in tools.models.values()} == MODEL_FAMILIES.keys()


def test_a_ragged_model_is_pruned_again(tools, tmp_path):
    lm = tools.lm_of("GQA")
    for seed in (1, 2):
        gated = open_gates(lm, ("heads", "ffn", "hidden"))
        lm = tools.check_law(tools.random_gates(gated, seed), tmp_path)
    assert len(set(lm.config.ffn_size)) > 1


def test_the_columns_of_t5_that_nobody_reads_go_too(tools, tmp_path):
    """Every head then reads its own column of those that stay, as in transformers."""
    lm = tools.lm_of("T5")
    open_ = jnp.array([0.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1)
    second_and_fourth = lambda path, leaf: Gate(open_) if isinstance(leaf, Gate) else leaf  # noqa: E731
    small = shrink(tools.change_leaves(open_gates(lm, ("heads",)), second_and_fourth))
    assert small.config.position_heads is small.config.decoder_position_heads is None
    assert save(small, tmp_path / "small") is None
    table = "encoder/relative_positions/embedding"
    assert np.array_equal(flatten(small.params)[table], flatten(lm.params)[table][:, [1, 3]])


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "path", "size"), [("layers", "layers_1/gate", ()), ("hidden", "hidden", (16,))])
def test_half_closed_gates_are_refused_where_nothing_can_take_the_factor(kind, path, size, tools):
    half_open = tools.set_leaves(open_gates(tools.lm_of("MHA"), (kind,)), {path: Gate(jnp.full(size, 0.5))})
    with pytest.raises(ValueError, match=rf"{path}: a gate must be 0 or 1"):
        shrink(half_open)


def test_half_closed_gates_before_codes_are_refused(tools):
    gated = open_gates(quantize(tools.lm_of("MHA")), ("ffn",))
    half_open = tools.set_leaves(gated, {"layers_1/mlp/gate": Gate(jnp.full(12, 0.5))})
    with pytest.raises(ValueError, match="layers_1/mlp/down/kernel: half-open gates cannot be folded into the codes"):
        shrink(half_open)


def test_unequal_query_heads_are_refused(tools):
    gate = Gate(jnp.ones((4, 2, 1)).at[2, 1].set(0.0))
    closed = tools.set_leaves(open_gates(tools.lm_of("GQA"), ("queries",)), {"layers_0/attention/gate": gate})
    with pytest.raises(ValueError, match=r"KV groups keep \[2, 2, 1, 2\] query heads"):
        shrink(closed)


def test_closing_every_layer_is_refused(tools):
    shut = lambda path, leaf: Gate(jnp.float32(0)) if isinstance(leaf, Gate) else leaf  # noqa: E731
    closed = tools.change_leaves(open_gates(tools.lm_of("MHA"), ("layers",)), shut)
    with pytest.raises(ValueError, match="at least one must stay"):
        shrink(closed)


def test_storage_that_does_not_follow_the_axis_is_refused():
    with pytest.raises(ValueError, match="here: ArrayImpl stores 3 entries along a x b, which are 6"):
        cut(jnp.ones((3, 2)), (("a", "b"), None), ((2, 3), (2,)), {"b": np.array([0])}, "here")
    with pytest.raises(ValueError, match="here: ArrayImpl stores 3 entries along a, which are 6"):
        cut(jnp.ones((3, 2)), ("a", None), ((6,), (2,)), {"a": np.array([0])}, "here")


def test_quantized_after_pruning_is_pruned_before_quantizing(tools):
    """The two orders give the same codes for columns that stay whole."""
    lm = tools.lm_of("MHA")
    pruned_first = quantize(prune(lm, ffn=0.25), dynamic=False)
    quantized_first = prune(quantize(lm, dynamic=False), ffn=0.25)
    assert pruned_first.config == quantized_first.config
    up = [np.asarray(flatten(both.params)["layers_0/mlp/up/kernel"].codes) for both in (pruned_first, quantized_first)]
    assert up[0].shape == up[1].shape == (16, 9)
