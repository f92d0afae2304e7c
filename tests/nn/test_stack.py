"""The canonical view and the run view are two ways to write one tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Gate, Quantized, arrays, describe, flatten, map_leaves, unflatten
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.nn.stack import canonical_view, segments

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_heads": 2}
MODELS = {
    "even": ("gpt2", {"num_layers": 3}),
    "one": ("gpt2", {"num_layers": 1}),
    "more than ten": ("gpt2", {"num_layers": 12}),
    "ragged": ("gpt2", {"num_layers": 5, "ffn_size": (6, 6, 4, 6, 6), "num_heads": (2, 2, 2, 2, 1), "head_dim": 4}),
    "window": ("qwen2", {"num_layers": 4, "num_kv_heads": 1, "window": 3, "window_from": 3}),
    "encoder-decoder": ("t5", {"num_layers": 2, "num_decoder_layers": 3, "decoder_ffn_size": (6, 6, 4)}),
}
SEGMENTS = {
    "even": ["layers_0-2"],
    "one": ["layers_0-0"],
    "more than ten": ["layers_0-11"],
    "ragged": ["layers_0-1", "layers_2-2", "layers_3-3", "layers_4-4"],
    "window": ["layers_0-2", "layers_3-3"],
    "encoder-decoder": ["encoder/layers_0-1", "decoder/layers_0-1", "decoder/layers_2-2"],
}


@functools.cache
def model_of(name):
    """Every array has different values, so that layers cannot be exchanged."""
    family, fields = MODELS[name]
    model = Network(model_config(family, **{**SIZES, "ffn_size": 6, **fields}))
    numbered = {path: i for i, path in enumerate(flatten(model.abstract()))}
    return model, map_leaves(lambda path, s: np.full(s.shape, numbered[path], np.float32), model.abstract())


def identical(a, b):
    flat_a, flat_b = arrays(a), arrays(b)
    return flat_a.keys() == flat_b.keys() and all(np.array_equal(flat_a[n], flat_b[n]) for n in flat_a)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    model, params = model_of(name)
    view = model.run_view(params)
    keys = {
        "/".join(part for part in path.split("/")[:2] if part in ("encoder", "decoder") or "layers" in part)
        for path in flatten(view)
        if "layers_" in path
    }
    assert keys == set(SEGMENTS[name])
    again = canonical_view(view)
    assert identical(again, params) and jax.tree.structure(again) == jax.tree.structure(params)
    assert identical(canonical_view(params), params)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_without_memory_take_the_same_way(name):
    model, params = model_of(name)
    shapes = lambda tree: {n: a.shape for n, a in arrays(tree).items()}  # noqa: E731
    view = model.run_view(model.abstract())
    assert shapes(view) == shapes(model.run_view(params)) and shapes(canonical_view(view)) == shapes(params)


def test_weights_and_sites_are_stacked_field_by_field():
    model, params = model_of("even")
    flat = flatten(params)
    w = Quantized.of(jax.random.normal(jax.random.key(0), (8, 6)))
    for i in range(3):
        flat[f"layers_{i}/mlp/up/kernel"] = LowRank(w, jnp.full((8, 1), i), jnp.ones((1, 6)), scale=0.5 if i else 0.25)
        flat[f"layers_{i}/mlp/gate"] = Gate(jnp.ones(6))
    view = model.run_view(unflatten(flat))
    assert {s.key for s in segments(view)} == {"layers_0-0", "layers_1-2"}, "another static field, another segment"
    assert view["layers_1-2"]["mlp"]["up"]["kernel"].base.codes.shape == (2, 8, 6)
    assert identical(canonical_view(view), unflatten(flat))
    info = describe(view, {**model.axes(), **{f"layers_{i}/mlp/gate": ("ffn",) for i in range(3)}})
    assert info["layers_1-2/mlp/up/kernel.base.codes"].axes == ("layers", "embed", "ffn")
    assert info["layers_1-2/mlp/gate.value"].path == "layers_1/mlp/gate"


def test_layers_are_in_order_of_their_numbers():
    assert [s.first for s in segments({f"layers_{n}": {} for n in (10, 9, 1, 0, 11, 2)})] == [0, 1, 2, 9, 10, 11]
    mixed = segments({"layers_3-11": {}, "embed": {}, "layers_12": {}, "layers_0-2": {}})
    assert mixed == [("layers_0-2", 0, 3), ("layers_3-11", 3, 9), ("layers_12", 12, None)]


def test_verdicts_and_breaks_start_segments():
    model, params = model_of("more than ten")
    frozen = model.run_view(params, lambda path: int(path.removeprefix("layers_")) < 6)
    assert [s.key for s in segments(frozen)] == ["layers_0-5", "layers_6-11"]
    cut = model.run_view(params, breaks={0, 4, 5})
    assert [s.key for s in segments(cut)] == ["layers_0-3", "layers_4-4", "layers_5-11"]
    assert identical(canonical_view(cut), params)
