"""Layers that share parameters: one leaf, gradients that sum, one step, one copy on disk."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Context, Masked, Tap, arrays, flatten, map_leaves, unflatten
from jaxlm.evaluate.cost import bytes_on_disk
from jaxlm.generate.decoding import generate
from jaxlm.io.pretrained import LM
from jaxlm.methods.prune.structured.depth import keep_layers
from jaxlm.methods.prune.structured.gates import open_gates, prune
from jaxlm.methods.share.layers import share, unshare
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.nn.stack import canonical_view, runs

# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
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
def model_of(name, family="gpt2", **fields):
    """A model whose biases and norms are random too."""
    model = Network(model_config(family, **SIZES, **FAMILIES[family], layer_map=MAPS[name], **fields))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return model, map_leaves(noise, model.init(jax.random.key(0)))


def alone(model):
    """The same network without sharing."""
    return Network(model.config.replace(layer_map=None, decoder_layer_map=None))


def outputs(model, params, batch=BATCH, **options):
    return quick(functools.partial(model.forward, **options))(params, batch)


def summed(grads, layer_map):
    """Gradients of the layers that are one, added up."""
    flat = flatten(grads)
    found = {path: g for path, g in flat.items() if not path.startswith("layers_")}
    for i, owner in enumerate(layer_map):
        for path, g in flat.items():
            if path.startswith(f"layers_{i}/"):
                target = path.replace(f"layers_{i}/", f"layers_{owner}/")
                found[target] = found[target] + g if target in found else g
    return found


@pytest.mark.parametrize(("name", "remat"), [("all", "none"), ("cycle", "full"), ("back", "none"), ("mixed", "full")])
def test_the_gradient_is_the_sum_over_the_layers(name, remat):
    """With dropout, which is that of the layer's place; both views; the window starts within a shared layer."""
    model, params = model_of(name, "qwen2" if name in ("all", "cycle") else "gpt2", dropout=0.3)

    def loss(model, params):
        ctx = Context(key=jax.random.key(1))
        return jnp.sum(jnp.sin(model.forward(params, BATCH, ctx=ctx, remat=remat)["logits"]))

    value, expected = quick(jax.value_and_grad(functools.partial(loss, alone(model))))(model.unshared(params))
    expected = summed(expected, MAPS[name])
    for view in (params, model.run_view(params)):
        own, found = quick(jax.value_and_grad(functools.partial(loss, model)))(view)
        found = flatten(canonical_view(found))
        assert np.isclose(own, value, rtol=1e-5) and found.keys() == expected.keys()
        for path, g in expected.items():
            assert np.abs(found[path] - g).max() <= 2e-5 * max(np.abs(g).max(), 1), path


def test_a_stack_is_few_scans():
    model, params = model_of("cycle")
    view = model.run_view(params)
    assert [key for key in view if key.startswith("layers")] == ["layers_0-1"]
    assert runs(view, model.config.layers(), (0, 1, 0, 1)) == [("layers_0-3", 0, 4, "layers_0-1", (0, 1, 0, 1))]
    assert runs(view, model.config.layers(), (0, 1)) == [("layers_0-1", 0, 2, "layers_0-1", None)]
    windowed = model_of("all", "qwen2")[0]
    found = runs(windowed.run_view(windowed.abstract()), windowed.config.layers(), MAPS["all"])
    assert [run.name for run in found] == ["layers_0-2", "layers_3-3"], "another structure, another scan"
    alone = runs(params, model.config.layers(), (0, 1, 0, 1))
    assert [(run.name, run.key) for run in alone] == [(f"layers_{i}", f"layers_{i % 2}") for i in range(4)]


@pytest.mark.parametrize("name", ["all", "back"])
def test_taps_are_those_of_every_place(name):
    model, params = model_of(name)
    taps = frozenset({Tap("hidden", i) for i in range(5)} | {Tap("attention", i) for i in range(4)})
    expected = outputs(alone(model), model.unshared(params), taps=taps)["taps"]
    for view in (params, model.run_view(params), model.run_view(params, breaks={1, 2})):
        found = outputs(model, view, taps=taps)["taps"]
        assert found.keys() == expected.keys()
        assert all(np.allclose(found[tap], expected[tap], atol=1e-5) for tap in taps)


@pytest.mark.parametrize("name", ["all", "mixed"])
def test_every_place_has_a_cache_of_its_own(name):
    model, params = model_of(name)
    prompt = {"input_ids": jnp.asarray(BATCH["input_ids"][:, :3])}
    write = lambda model, params: np.asarray(  # noqa: E731
        quick(lambda params: generate(model.config, params, prompt, jax.random.key(0), new_tokens=4))(params)
    )
    expected = write(alone(model), model.unshared(params))
    assert np.array_equal(write(model, params), expected)
    assert np.array_equal(write(model, model.run_view(params)), expected)


def test_one_copy_on_disk(tmp_path):
    model, params = model_of("all")
    reason = jaxlm.save(LM(model.config, params), tmp_path / "shared")
    assert "no place for layer_map=(0, 0, 0, 0)" in reason
    again = jaxlm.load(tmp_path / "shared")
    assert again.config == model.config and again.config.layer_map == (0, 0, 0, 0)
    assert flatten(again.params).keys() == flatten(params).keys()
    assert all(np.array_equal(a, arrays(params)[name]) for name, a in arrays(again.params).items())
    assert np.array_equal(
        again.apply(again.params, BATCH)["logits"], LM(model.config, params).apply(params, BATCH)["logits"]
    )
    jaxlm.save(LM(alone(model).config, model.unshared(params)), tmp_path / "alone", native=True)
    layer = 4 * sum(a.size for path, a in flatten(params).items() if path.startswith("layers_0/"))
    saved = bytes_on_disk(tmp_path / "alone") - bytes_on_disk(tmp_path / "shared")
    names = 120 * 4 * sum(path.startswith("layers_0/") for path in flatten(params))
    assert 3 * layer <= saved <= 3 * layer + names, "three layers of parameters, and their names in the header"


def test_an_encoder_and_a_decoder_share_apart(tmp_path):
    fields = {**SIZES, "num_layers": 2, "num_decoder_layers": 3, "relative_buckets": 4}
    model = Network(model_config("t5", **fields, layer_map=(0, 0), decoder_layer_map=(0, 1, 0)))
    params = model.init(jax.random.key(0))
    layers = {"/".join(path.split("/")[:2]) for path in flatten(params) if "layers_" in path}
    assert layers == {"encoder/layers_0", "decoder/layers_0", "decoder/layers_1"}
    batch = BATCH | {"decoder_input_ids": BATCH["input_ids"][:, :4]}
    expected = outputs(alone(model), model.unshared(params), batch)["logits"]
    for view in (params, model.run_view(params)):
        assert np.allclose(outputs(model, view, batch)["logits"], expected, atol=1e-5)
    jaxlm.save(LM(model.config, params), tmp_path)
    assert jaxlm.load(tmp_path).config == model.config


# Surgery -------------------------------------------------------------------------------------------------------------


@functools.cache
def whole():
    model = Network(model_config("gpt2", **SIZES, max_positions=8))
    return model, model.init(jax.random.key(3))


@pytest.mark.parametrize("how", ["average", "first"])
@pytest.mark.parametrize("name", ["all", "cycle"])
def test_layers_become_their_average_or_the_first(name, how):
    model, params = whole()
    small, new, axes = share(model, params, model.axes(), layer_map=MAPS[name], how=how)
    assert small.config.layer_map == MAPS[name] and axes == small.axes()
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, small.abstract())
    old = flatten(params)
    for path, leaf in flatten(new).items():
        if not path.startswith("layers_"):
            assert leaf is old[path]
            continue
        owner, rest = path.split("/", 1)
        members = [old[f"layers_{i}/{rest}"] for i, n in enumerate(MAPS[name]) if f"layers_{n}" == owner]
        assert np.allclose(leaf, np.mean(members, axis=0) if how == "average" else members[0], atol=1e-7)


def test_sharing_what_is_equal_changes_nothing_and_unsharing_goes_back(tmp_path):
    model, params = model_of("back")
    own, grown, axes = unshare(model, params, model.axes())
    assert own.config.layer_map is None and axes == own.axes()
    assert jaxlm.save(LM(own.config, grown), tmp_path) is None, "transformers can express it again"
    small, again, names = share(own, grown, axes, layer_map=MAPS["back"])
    assert small == model and names == model.axes()
    for path, leaf in flatten(params).items():
        assert np.allclose(flatten(again)[path], leaf, atol=1e-7)


def test_first_takes_weights_as_they_are():
    model, params = whole()
    masked = Masked(jnp.ones((8, 12)), jnp.ones((8, 12), bool))
    params = unflatten({**flatten(params), "layers_1/mlp/up/kernel": masked})
    with pytest.raises(ValueError, match=r"layers_1/mlp/up/kernel is a Masked, which has no average"):
        share(model, params, model.axes(), layer_map=(0, 0, 1, 1))
    kept = share(model, params, model.axes(), layer_map=(0, 1, 0, 1), how="first")[1]
    assert flatten(kept)["layers_1/mlp/up/kernel"] is masked


def test_shared_layers_are_pruned_together(tmp_path):
    """As the same layers apart: they are equal, so the same heads and units go."""
    model, params = model_of("back")
    small, little, axes = prune(model, params, model.axes(), heads=0.5, ffn=0.25)
    assert small.config.num_heads == (1,) * 4 and small.config.ffn_size == (9,) * 4 and axes == small.axes()
    apart = prune(*unshare(model, params, model.axes()), heads=0.5, ffn=0.25)
    assert np.allclose(outputs(small, little)["logits"], outputs(*apart[:2])["logits"], atol=1e-5)
    jaxlm.save(LM(small.config, little), tmp_path)
    assert jaxlm.load(tmp_path).config == small.config
    with pytest.raises(ValueError, match="put the surgery unshare first"):
        keep_layers(model, params, model.axes(), keep=(0, 1))
    with pytest.raises(ValueError, match="put the surgery unshare first"):
        open_gates(model, params, model.axes(), {"layers"})


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
    model, params = whole()
    small, new, axes = share(model, params, model.axes(), layer_map=MAPS["all"])
    for change, message in (
        (lambda: share(small, new, axes, layer_map=MAPS["all"]), "shared already"),
        (lambda: unshare(model, params, model.axes()), "no layers are shared"),
        (lambda: share(model, params, model.axes()), "needs layer_map"),
        (lambda: share(model, params, model.axes(), layer_map=MAPS["all"], how="mean"), "must be 'average' or 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
