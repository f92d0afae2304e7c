"""The law of the chapter: a shrunk model computes what the gated one did."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.compress.quantize import quantize
from jaxlm.compress.structured import close_gates, head_scores, keep_layers, open_gates, prune, shrink, structured
from jaxlm.core import Gate, LowRank, Masked, Quantized, chain, flatten, map_leaves, unflatten
from jaxlm.core.paths import canonical_path
from jaxlm.io.model import LM
from jaxlm.models import model_config
from jaxlm.models.model import Model

# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "ffn_size": 12, "num_heads": 4}
MODELS = {
    "MHA": ("gpt2", {"num_layers": 3, "max_positions": 8}),
    "GQA": ("llama", {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4, "qkv_bias": True, "mlp_bias": True}),
    "MQA": ("llama", {"num_kv_heads": 1, "qkv_bias": True, "output_bias": True}),
    "post-norm": ("bert", {"max_positions": 8}),
    "T5": ("t5", {"gated": True}),
}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 19, (2, 6)),
    "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
    "decoder_input_ids": np.random.default_rng(1).integers(1, 19, (2, 5)),
}


@functools.cache
def model_of(name):
    """A model whose biases and norms are random too."""
    family, fields = MODELS[name]
    model = Model(model_config(family, **{**SIZES, **fields}))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return model, map_leaves(noise, model.init(jax.random.key(0)))


@functools.cache
def _forward(config):
    return jax.jit(Model(config).forward, compiler_options=QUICK)


def logits(model, params):
    batch = BATCH if model.config.encoder_decoder else {n: BATCH[n] for n in ("input_ids", "attention_mask")}
    values = np.asarray(_forward(model.config)(params, batch)["logits"])
    return values if model.config.encoder_decoder else values[BATCH["attention_mask"] > 0]


def random_gates(params, seed):
    """Every gate with some closed entries, and at least one open: another number in every layer."""
    rng = np.random.default_rng(seed)

    def close(path, leaf):
        if not isinstance(leaf, Gate):
            return leaf
        value = np.zeros(leaf.value.size, np.float32)
        value[rng.permutation(leaf.value.size)[: rng.integers(1, leaf.value.size + 1)]] = 1
        return Gate(jnp.asarray(value).reshape(leaf.value.shape))

    return map_leaves(close, params)


def check_law(model, params, axes, tmp_path):
    """Gated and shrunk logits agree, also after saving and reloading; returns the shrunk model."""
    expected = logits(model, params)
    small, little, small_axes = shrink(model, params, axes, model.sizes())
    assert flatten(little).keys() == small_axes.keys() == flatten(small.abstract()).keys()
    assert jax.tree.map(lambda s: s.shape, small.abstract()) == map_leaves(lambda _, leaf: tuple(leaf.shape), little)
    assert np.abs(expected).max() > 0.2 and np.abs(logits(small, little) - expected).max() <= 1e-5
    jaxlm.save(LM(small.config, little), tmp_path / "model")
    again = jaxlm.load(tmp_path / "model")
    assert again.config == small.config
    assert np.array_equal(logits(small, again.params), logits(small, little))
    return small, little, small_axes


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_units(name, tmp_path):
    model, params = model_of(name)
    params, axes = open_gates(params, model.axes(), model.sizes(), True, True)
    assert np.array_equal(logits(model, params), logits(model, model_of(name)[1])), "an open gate changes nothing"
    closed = random_gates(params, seed=len(name))
    assert np.abs(logits(model, closed) - logits(model, params)).max() > 1e-2
    small, _, _ = check_law(model, closed, axes, tmp_path)
    assert sum(small.config.ffn_size) < sum(model.config.ffn_size)
    assert sum(small.config.num_heads) < sum(model.config.num_heads)
    if name == "T5":
        assert sum(small.config.cross_num_heads) < 8 and sum(small.config.decoder_num_heads) < 8


def low_rank(path, leaf):
    a, b = (
        jax.random.normal(jax.random.key(s), shape) for s, shape in ((1, (leaf.shape[0], 2)), (2, (2, leaf.shape[1])))
    )
    return LowRank(leaf, 0.1 * a, b, scale=0.5)


WRAP = {
    "Masked": lambda path, leaf: Masked(leaf, jax.random.bernoulli(jax.random.key(3), 0.7, leaf.shape)),
    "Quantized": lambda path, leaf: Quantized.of(leaf),
    "LowRank": low_rank,
    "LowRank(Quantized)": lambda path, leaf: low_rank(path, Quantized.of(leaf)),
}


@pytest.mark.parametrize("wrap", WRAP)
def test_weights_are_cut_in_every_field(wrap, tmp_path):
    model, params = model_of("GQA")
    params, axes = open_gates(params, model.axes(), model.sizes(), True, True)
    params = map_leaves(lambda path, leaf: WRAP[wrap](path, leaf) if "/kernel" in path else leaf, params)
    check_law(model, random_gates(params, seed=3), axes, tmp_path)


@pytest.mark.parametrize("name", ["MHA", "post-norm", "T5"])
def test_layers(name, tmp_path):
    model, params = model_of(name)
    flat, axes = flatten(params), model.axes()
    stacks = ("encoder/", "decoder/") if name == "T5" else ("",)
    for stack in stacks:
        for i in range(model.config.num_layers):
            path = f"{stack}layers_{i}/gate"
            flat[path], axes[path] = Gate(jnp.float32(i != 0)), ()
    small, _, _ = check_law(model, unflatten(flat), axes, tmp_path)
    assert small.config.num_layers == model.config.num_layers - 1


def test_keep_layers_is_the_layers_kept():
    model, params = model_of("MHA")
    small, little, axes = keep_layers(model, params, model.axes(), keep=(0, 2))
    assert small.config.num_layers == 2 and "layers_2/mlp/up/kernel" not in axes
    for new, old in ((0, 0), (1, 2)):
        assert np.array_equal(
            flatten(little)[f"layers_{new}/mlp/up/kernel"], flatten(params)[f"layers_{old}/mlp/up/kernel"]
        )


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [("MHA", (0, 3), r"\[3\] chosen of 0..2"), ("MHA", (), "none"), ("T5", (0,), "two stacks")],
)
def test_keep_layers_refuses(name, keep, message):
    model, params = model_of(name)
    with pytest.raises(ValueError, match=message):
        keep_layers(model, params, model.axes(), keep=keep)


@pytest.mark.parametrize("name", ["MQA", "T5"])
def test_pruning_twice(name, tmp_path):
    """A ragged or already renumbered model is pruned like any other."""
    model, params = model_of(name)
    axes = model.axes()
    for share in (0.25, 0.34):
        opened, gated_axes = open_gates(params, axes, model.sizes(), True, True)
        model, params, axes = check_law(model, close_gates(opened, share, share), gated_axes, tmp_path)
    assert set(model.config.num_heads) == {2}
    assert set(model.config.num_kv_heads) == {{"MQA": 1}.get(name, 2)}
    assert set(model.config.ffn_size) == {6}


def test_a_ragged_model_is_pruned_again(tmp_path):
    model, params = model_of("GQA")
    for seed in (1, 2):
        params, axes = open_gates(params, model.axes(), model.sizes(), True, True)
        model, params, _ = check_law(model, random_gates(params, seed), axes, tmp_path)
    assert len(set(model.config.ffn_size)) > 1


def test_the_columns_of_t5_that_nobody_reads_go_too():
    model, params = model_of("T5")
    params, axes = open_gates(params, model.axes(), model.sizes(), True, False)
    open_ = jnp.array([0.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1)
    params = map_leaves(lambda path, leaf: Gate(open_) if isinstance(leaf, Gate) else leaf, params)
    small, little, _ = shrink(model, params, axes, model.sizes())
    assert small.config.position_heads == small.config.decoder_position_heads == ((0, 1), (0, 1))
    table = "encoder/relative_positions/embedding"
    assert np.array_equal(flatten(little)[table], flatten(params)[table][:, [1, 3]])


# Scores ---------------------------------------------------------------------------------------------------------------


def test_the_least_important_go_first():
    model, params = model_of("GQA")
    flat = flatten(params)
    for i, head in enumerate((2, 0)):
        path = f"layers_{i}/attention/output/kernel"
        flat[path] = flat[path].at[8 * head : 8 * (head + 1)].multiply(1e-3)
        path = f"layers_{i}/mlp/down/kernel"
        flat[path] = flat[path].at[jnp.array([1, 5, 7])].multiply(1e-3)
    opened, _ = open_gates(unflatten(flat), model.axes(), model.sizes(), True, True)
    closed = flatten(close_gates(opened, 0.25, 0.25))
    for i, head in enumerate((2, 0)):
        assert np.flatnonzero(closed[f"layers_{i}/attention/gate"].value == 0).tolist() == [head]
        assert np.flatnonzero(closed[f"layers_{i}/mlp/gate"].value == 0).tolist() == [1, 5, 7]


def test_head_scores_by_hand():
    own = model_of("GQA")[1]["layers_0"]["attention"]
    query, key, value, output = (np.asarray(own[n]["kernel"], np.float64) for n in ("query", "key", "value", "output"))
    for g in range(4):
        two, one = slice(8 * g, 8 * g + 8), slice(4 * g, 4 * g + 4)
        inwards = (query[:, two] ** 2).sum() + (key[:, one] ** 2).sum() + (value[:, one] ** 2).sum()
        expected = np.sqrt(inwards) * np.linalg.norm(output[two])
        assert np.isclose(head_scores(own, 4, ("query", "key", "value"))[g], expected, rtol=1e-5)


def test_gates_close_the_same_in_both_views():
    model, params = model_of("MQA")
    opened, _ = open_gates(params, model.axes(), model.sizes(), True, True)
    one, many = flatten(close_gates(opened, 0.5, 0.3)), flatten(close_gates(model.run_view(opened), 0.5, 0.3))
    for path, leaf in many.items():
        if isinstance(leaf, Gate):
            for i in range(2):
                own = canonical_path(path).replace("layers_0", f"layers_{i}")
                assert np.array_equal(leaf.value[i], one[own].value)
    assert one["layers_1/attention/gate"].value.shape == (1, 4, 1)


def test_one_always_stays():
    model, params = model_of("MHA")
    small, _, _ = prune(model, params, model.axes(), heads=0.99, ffn=0.99)
    assert set(small.config.num_heads) == {1} and set(small.config.ffn_size) == {1}


# Errors --------------------------------------------------------------------------------------------------------------


def test_half_closed_gates_are_refused():
    model, params = model_of("MHA")
    params, axes = open_gates(params, model.axes(), model.sizes(), False, True)
    params["layers_1"]["mlp"]["gate"] = Gate(jnp.full(12, 0.5))
    with pytest.raises(ValueError, match=r"layers_1/mlp/gate: a gate must be 0 or 1"):
        shrink(model, params, axes, model.sizes())


def test_closing_every_layer_is_refused():
    model, params = model_of("MHA")
    flat, axes = flatten(params), model.axes()
    for i in range(3):
        flat[f"layers_{i}/gate"], axes[f"layers_{i}/gate"] = Gate(jnp.float32(0)), ()
    with pytest.raises(ValueError, match="at least one must stay"):
        shrink(model, unflatten(flat), axes, model.sizes())


def test_two_structured_prunings_are_refused():
    model, params = model_of("MHA")
    twice = chain([("a", structured(ffn=0.5, end=2)), ("b", structured(ffn=0.2, heads=0.5, end=2))])
    with pytest.raises(ValueError, match="b and a both claim the width of layers_0/mlp"):
        twice.init(jax.random.key(0), model, params, model.axes())


def test_quantized_after_pruning_is_pruned_before_quantizing():
    """The two orders give the same codes for columns that stay whole."""
    model, params = model_of("MHA")
    first, a, _ = quantize(*prune(model, params, model.axes(), ffn=0.25), dynamic=False)
    second, b, _ = prune(*quantize(model, params, model.axes(), dynamic=False), ffn=0.25)
    assert first == second
    up = [np.asarray(flatten(tree)["layers_0/mlp/up/kernel"].codes) for tree in (a, b)]
    assert up[0].shape == up[1].shape == (16, 9)
