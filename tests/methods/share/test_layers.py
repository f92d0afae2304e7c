"""Layers that share parameters: one leaf, gradients that sum, one step, one copy on disk."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

import jaxlm
from jaxlm.core import Context, Masked, Tap, arrays, flatten, map_leaves, unflatten
from jaxlm.evaluate.cost import bytes_on_disk
from jaxlm.generate.decoding import generate
from jaxlm.io.lm import LM
from jaxlm.methods.prune.structured.depth import keep_layers
from jaxlm.methods.prune.structured.gates import open_gates, prune
from jaxlm.methods.share.layers import share, unshare
from jaxlm.models import model_config
from jaxlm.nn.stack import canonical_view, runs

pytestmark = pytest.mark.slow

quick = functools.partial(jax.jit, compiler_options=QUICK)
SIZES = {"vocab_size": 17, "hidden_size": 8, "num_layers": 4, "num_heads": 2, "ffn_size": 12}
FAMILIES = {"gpt2": {"max_positions": 8}, "qwen2": {"num_kv_heads": 1, "window": 2, "window_from": 3}}
MAPS = {
    "all": (0, 0, 0, 0),
    "cycle": (0, 1, 0, 1),
    "back": (0, 1, 1, 0),
    "mixed": (0, 1, 2, 1),
}
BATCH = {"input_ids": np.random.default_rng(0).integers(0, 17, (2, 6))}


@functools.cache
def shared_lm(name, family="gpt2", **fields):
    """A model with shared layers, whose biases and norms are random too."""
    config = model_config(family, **SIZES, **FAMILIES[family], layer_map=MAPS[name], **fields)
    lm = LM.initialize(config, jax.random.key(0))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return lm.replace(params=map_leaves(noise, lm.params))


def without_sharing(lm):
    """The same function, each layer with parameters of its own."""
    config = lm.config.replace(layer_map=None, decoder_layer_map=None)
    return LM(config, lm.network.unshared(lm.params))


def outputs(network, params, batch=BATCH, **options):
    return quick(functools.partial(network.forward, **options))(params, batch)


def summed(grads, layer_map):
    """Gradients of the layers that are one, added up."""
    flat = flatten(grads)
    total = {path: g for path, g in flat.items() if not path.startswith("layers_")}
    for i, owner in enumerate(layer_map):
        for path, g in flat.items():
            if path.startswith(f"layers_{i}/"):
                target = path.replace(f"layers_{i}/", f"layers_{owner}/")
                total[target] = total[target] + g if target in total else g
    return total


@pytest.mark.full("cycle-full", "back-none")
@pytest.mark.parametrize(("name", "remat"), [("all", "none"), ("cycle", "full"), ("back", "none"), ("mixed", "full")])
def test_the_gradient_is_the_sum_over_the_layers(name, remat):
    """With dropout, other in each layer of the stack; both views; the window starts within a shared layer."""
    lm = shared_lm(name, "qwen2" if name in ("all", "cycle") else "gpt2", dropout=0.3)
    apart = without_sharing(lm)

    def loss(network, params):
        ctx = Context(key=jax.random.key(1))
        return jnp.sum(jnp.sin(network.forward(params, BATCH, ctx=ctx, remat=remat)["logits"]))

    expected, grads = quick(jax.value_and_grad(functools.partial(loss, apart.network)))(apart.params)
    expected_grads = summed(grads, MAPS[name])
    for params in (lm.params, lm.network.run_view(lm.params)):
        value, grads = quick(jax.value_and_grad(functools.partial(loss, lm.network)))(params)
        grads = flatten(canonical_view(grads))
        assert np.isclose(value, expected, rtol=1e-5) and grads.keys() == expected_grads.keys()
        for path, g in expected_grads.items():
            assert np.abs(grads[path] - g).max() <= 2e-5 * max(np.abs(g).max(), 1), path


def test_a_stack_is_few_scans():
    lm = shared_lm("cycle")
    view, layers = lm.network.run_view(lm.params), lm.config.layers()
    assert [key for key in view if key.startswith("layers")] == ["layers_0-1"]
    assert runs(view, layers, (0, 1, 0, 1)) == [("layers_0-3", 0, 4, "layers_0-1", (0, 1, 0, 1))]
    assert runs(view, layers, (0, 1)) == [("layers_0-1", 0, 2, "layers_0-1", None)]
    windowed = shared_lm("all", "qwen2").network
    scans = runs(windowed.run_view(windowed.abstract()), windowed.config.layers(), MAPS["all"])
    assert [run.name for run in scans] == ["layers_0-2", "layers_3-3"], "another structure, another scan"
    unstacked = runs(lm.params, layers, (0, 1, 0, 1))
    assert [(run.name, run.key) for run in unstacked] == [(f"layers_{i}", f"layers_{i % 2}") for i in range(4)]


@pytest.mark.parametrize("name", ["all", "back"])
def test_taps_are_those_of_every_layer(name):
    lm = shared_lm(name)
    network, apart = lm.network, without_sharing(lm)
    tapped = frozenset({Tap("hidden", i) for i in range(5)} | {Tap("attention", i) for i in range(4)})
    expected = outputs(apart.network, apart.params, taps=tapped)["taps"]
    for params in (lm.params, network.run_view(lm.params), network.run_view(lm.params, breaks={1, 2})):
        taps = outputs(network, params, taps=tapped)["taps"]
        assert taps.keys() == expected.keys()
        assert all(np.allclose(taps[tap], expected[tap], atol=1e-5) for tap in tapped)


@pytest.mark.parametrize("name", ["all", "mixed"])
def test_every_layer_has_a_cache_of_its_own(name):
    lm = shared_lm(name)
    prompt = {"input_ids": jnp.asarray(BATCH["input_ids"][:, :3])}
    write = lambda config, params: np.asarray(  # noqa: E731
        quick(lambda params: generate(config, params, prompt, jax.random.key(0), new_tokens=4))(params)
    )
    apart = without_sharing(lm)
    expected = write(apart.config, apart.params)
    assert np.array_equal(write(lm.config, lm.params), expected)
    assert np.array_equal(write(lm.config, lm.network.run_view(lm.params)), expected)


def test_one_copy_on_disk(tmp_path):
    lm = shared_lm("all")
    reason = jaxlm.save(lm, tmp_path / "shared")
    assert "cannot express layer_map=(0, 0, 0, 0)" in reason
    again = jaxlm.load(tmp_path / "shared")
    assert again.config == lm.config and again.config.layer_map == (0, 0, 0, 0)
    assert flatten(again.params).keys() == flatten(lm.params).keys()
    assert all(np.array_equal(a, arrays(lm.params)[name]) for name, a in arrays(again.params).items())
    assert np.array_equal(again.apply(again.params, BATCH)["logits"], lm.apply(lm.params, BATCH)["logits"])
    jaxlm.save(without_sharing(lm), tmp_path / "apart", native=True)
    layer = 4 * sum(a.size for path, a in flatten(lm.params).items() if path.startswith("layers_0/"))
    saved = bytes_on_disk(tmp_path / "apart") - bytes_on_disk(tmp_path / "shared")
    names = 120 * 4 * sum(path.startswith("layers_0/") for path in flatten(lm.params))
    assert 3 * layer <= saved <= 3 * layer + names, "three layers of parameters, and their names in the header"


def test_an_encoder_and_a_decoder_share_apart(tmp_path):
    fields = {**SIZES, "num_layers": 2, "num_decoder_layers": 3, "relative_buckets": 4}
    config = model_config("t5", **fields, layer_map=(0, 0), decoder_layer_map=(0, 1, 0))
    lm = LM.initialize(config, jax.random.key(0))
    layers = {"/".join(path.split("/")[:2]) for path in flatten(lm.params) if "layers_" in path}
    assert layers == {"encoder/layers_0", "decoder/layers_0", "decoder/layers_1"}
    batch, apart = BATCH | {"decoder_input_ids": BATCH["input_ids"][:, :4]}, without_sharing(lm)
    expected = outputs(apart.network, apart.params, batch)["logits"]
    for params in (lm.params, lm.network.run_view(lm.params)):
        assert np.allclose(outputs(lm.network, params, batch)["logits"], expected, atol=1e-5)
    jaxlm.save(lm, tmp_path)
    assert jaxlm.load(tmp_path).config == config


# Surgery -------------------------------------------------------------------------------------------------------------


@functools.cache
def unshared_lm():
    return LM.initialize(model_config("gpt2", **SIZES, max_positions=8), jax.random.key(3))


@pytest.mark.parametrize("how", ["average", "first"])
@pytest.mark.parametrize("name", ["all", "cycle"])
def test_layers_become_their_average_or_the_first(name, how):
    lm = unshared_lm()
    small = share(lm, layer_map=MAPS[name], how=how)
    assert small.config.layer_map == MAPS[name] and small.axes == small.network.axes()
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, small.network.abstract())
    old = flatten(lm.params)
    for path, leaf in flatten(small.params).items():
        if not path.startswith("layers_"):
            assert leaf is old[path]
            continue
        owner, rest = path.split("/", 1)
        members = [old[f"layers_{i}/{rest}"] for i, n in enumerate(MAPS[name]) if f"layers_{n}" == owner]
        assert np.allclose(leaf, np.mean(members, axis=0) if how == "average" else members[0], atol=1e-7)


def test_sharing_what_is_equal_changes_nothing_and_unsharing_goes_back(tmp_path):
    lm = shared_lm("back")
    apart = unshare(lm)
    assert apart.config.layer_map is None and apart.axes == apart.network.axes()
    assert jaxlm.save(apart, tmp_path) is None, "transformers can express it again"
    again = share(apart, layer_map=MAPS["back"])
    assert again.network == lm.network and again.axes == lm.network.axes()
    for path, leaf in flatten(lm.params).items():
        assert np.allclose(flatten(again.params)[path], leaf, atol=1e-7)


def test_first_takes_weights_as_they_are():
    masked = Masked(jnp.ones((8, 12)), jnp.ones((8, 12), bool))
    lm = unshared_lm()
    lm = lm.replace(params=unflatten({**flatten(lm.params), "layers_1/mlp/up/kernel": masked}))
    with pytest.raises(ValueError, match=r"layers_1/mlp/up/kernel is a Masked, which has no average"):
        share(lm, layer_map=(0, 0, 1, 1))
    first = share(lm, layer_map=(0, 1, 0, 1), how="first")
    assert flatten(first.params)["layers_1/mlp/up/kernel"] is masked


def test_shared_layers_are_pruned_together(tmp_path):
    """As the same layers apart: they are equal, so the same heads and units go."""
    lm = shared_lm("back")
    small, apart = (prune(whole, heads=0.5, ffn=0.25) for whole in (lm, unshare(lm)))
    assert small.config.num_heads == (1,) * 4 and small.config.ffn_size == (9,) * 4
    assert small.axes == small.network.axes()
    logits, expected = (outputs(pruned.network, pruned.params)["logits"] for pruned in (small, apart))
    assert np.allclose(logits, expected, atol=1e-5)
    jaxlm.save(small, tmp_path)
    assert jaxlm.load(tmp_path).config == small.config
    with pytest.raises(ValueError, match="put the surgery unshare first"):
        keep_layers(lm, keep=(0, 1))
    with pytest.raises(ValueError, match="put the surgery unshare first"):
        open_gates(lm, {"layers"})


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ((0, 0, 0), "must name a stored layer for each of 4 layers"),
        ((0, 2, 2, 0), "numbered from 0 in the order of their first use"),
        ((1, 0, 0, 1), "numbered from 0 in the order of their first use"),
        ((1, 1, 1, 1), "numbered from 0 in the order of their first use"),
        ((0, 0, 1, 0), "layers 0 and 3 share their parameters, but ffn_size is 12 and 6"),
    ],
)
def test_maps_that_cannot_be(layer_map, message):
    with pytest.raises(ValueError, match=message):
        model_config("gpt2", **{**SIZES, "ffn_size": (12, 12, 6, 6)}, layer_map=layer_map)


def test_a_map_that_shares_nothing_is_none():
    assert model_config("gpt2", **SIZES, layer_map=(0, 1, 2, 3)).layer_map is None


def test_surgeries_say_what_is_wrong():
    lm = unshared_lm()
    small = share(lm, layer_map=MAPS["all"])
    for change, message in (
        (lambda: share(small, layer_map=MAPS["all"]), "shared already"),
        (lambda: unshare(lm), "no layers are shared"),
        (lambda: share(lm), "needs layer_map"),
        (lambda: share(lm, layer_map=MAPS["all"], how="mean"), "must be 'average' or 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
