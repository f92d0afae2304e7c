"""SmoothQuant: the same function in every family, folded where that is valid, and what rounding gains by it."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import FakeQuant, InputScaled, LowRank, Masked, flatten, map_leaves, unflatten
from jaxlm.methods.calibration import Calibration
from jaxlm.methods.quantize.smoothquant import AFTER_NORMS, smooth_scale, smoothquant
from jaxlm.models import model_config
from jaxlm.models.network import Network

# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "ffn_size": 12, "num_heads": 4}
MODELS = {
    "gpt2": {"max_positions": 8},
    "llama": {"num_kv_heads": 2},
    "bert": {"max_positions": 8},
    "t5": {},
}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 19, (4, 6)),
    "attention_mask": (np.arange(6) < np.array([[6], [4], [5], [6]])).astype(np.int32),
}


@functools.cache
def model_of(family):
    """A model with random norms and biases."""
    model = Network(model_config(family, **SIZES, **MODELS[family]))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return model, map_leaves(noise, model.init(jax.random.key(0)))


def with_outliers(params):
    """The same function with an outlying channel: thirty times as large behind norms, a thirtieth in what reads it."""
    flat = flatten(params)
    for path in flat:
        if "layers_" in path and "norm/" in path:
            flat[path] = flat[path].at[3].multiply(30.0)
        elif re.fullmatch(AFTER_NORMS, path):
            flat[path] = flat[path].at[3].divide(30.0)
    return unflatten(flat)


def batch_of(family):
    return BATCH | {"decoder_input_ids": BATCH["input_ids"][:, ::-1]} if family == "t5" else BATCH


def smoothed(family, params=None, **options):
    model, own = model_of(family)
    calibration = Calibration([batch_of(family)])
    return smoothquant(model, own if params is None else params, model.axes(), calibration, **options)[1]


EVERYTHING = r".*layers_\d+/.*/kernel"


@functools.cache
def cases(family, everything=False):
    return smoothed(family, fold=False, targets=EVERYTHING, alpha=0.7) if everything else smoothed(family)


@functools.cache
def _forward(config):
    return jax.jit(Network(config).forward, compiler_options=QUICK)


def logits(family, params):
    return np.asarray(_forward(model_of(family)[0].config)(params, batch_of(family))["logits"])


@pytest.mark.parametrize(("family", "everything"), [*((f, False) for f in MODELS), ("t5", True), ("llama", True)])
def test_the_function_stays(family, everything):
    _, params = model_of(family)
    new, expected = cases(family, everything), logits(family, params)
    assert np.abs(logits(family, new) - expected).max() <= 1e-5 * np.abs(expected).max()
    changed = [path for path, leaf in flatten(new).items() if leaf is not flatten(params)[path]]
    assert any(path.endswith("query/kernel") for path in changed)


def test_folding_is_only_where_it_is_valid():
    scaled = {f: {p for p, leaf in flatten(cases(f)).items() if isinstance(leaf, InputScaled)} for f in MODELS}
    assert not scaled["gpt2"] and not scaled["llama"] and not scaled["t5"], "every norm is read by one group alone"
    products = ("attention/query", "attention/key", "attention/value", "mlp/up")
    assert scaled["bert"] == {f"layers_{i}/{p}/kernel" for i in range(2) for p in products}
    folded = flatten(smoothed("t5", targets=EVERYTHING))
    kept = {p.split("/", 2)[2] for p, leaf in folded.items() if isinstance(leaf, InputScaled)}
    crossing = {f"cross_attention/{p}/kernel" for p in ("key", "value", "output")}
    assert kept == {"attention/output/kernel", "mlp/down/kernel"} | crossing


def test_products_that_share_an_input_share_the_scale():
    new, (_, params) = cases("bert"), model_of("bert")
    own = new["layers_1"]["attention"]
    scale = np.asarray(own["query"]["kernel"].scale)
    for name in ("query", "key", "value"):
        assert np.array_equal(own[name]["kernel"].scale, scale)
        before = np.asarray(params["layers_1"]["attention"][name]["kernel"])
        assert np.allclose(own[name]["kernel"].base, before / scale[:, None], rtol=1e-5)


def test_the_ranges_are_equal_at_one_half():
    """max|x|/s and s·max|W| are both sqrt(max|x| max|W|)."""
    x, w = jnp.array([100.0, 1.0, 0.0]), jnp.array([0.04, 2.0, 1.0])
    s = smooth_scale(x, w, 0.5)
    assert np.allclose(x / s, s * w * (x > 0), rtol=1e-5) and s[2] == 1
    assert np.allclose(smooth_scale(x, w, 1.0)[:2], x[:2]) and np.allclose(smooth_scale(x, w, 0.0)[:2], 1 / w[:2])


def rounded(params):
    """Every kernel and its inputs rounded to int8, below the scaling where there is one."""
    wrap = lambda leaf: FakeQuant.of(leaf, dynamic=True)  # noqa: E731

    def round_(path, leaf):
        if "layers_" not in path or not path.endswith("kernel"):
            return leaf
        return leaf.replace(base=wrap(leaf.base)) if isinstance(leaf, InputScaled) else wrap(leaf)

    return map_leaves(round_, params)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rounded_inputs_are_closer(family):
    params, exact = with_outliers(model_of(family)[1]), logits(family, model_of(family)[1])
    error = lambda tree: np.linalg.norm(logits(family, rounded(tree)) - exact)  # noqa: E731
    assert np.abs(logits(family, params) - exact).max() < 1e-4
    assert error(smoothed(family, params)) < 0.5 * error(params)


def test_masks_stay():
    _, params = model_of("llama")
    flat = flatten(params)
    path = "layers_0/mlp/up/kernel"
    mask = jnp.arange(16 * 12).reshape(16, 12) % 2 == 0
    flat[path] = Masked(jnp.where(mask, flat[path], 0), mask)
    new = flatten(smoothed("llama", unflatten(flat)))[path]
    assert isinstance(new, Masked) and np.array_equal(new.mask, mask) and not np.asarray(new.base)[~mask].any()


def test_refused():
    with pytest.raises(ValueError, match="smoothquant: alpha must be in"):
        smoothed("gpt2", alpha=1.5)
    flat = flatten(model_of("gpt2")[1])
    path = "layers_1/attention/key/kernel"
    flat[path] = LowRank(flat[path], jnp.ones((16, 1)), jnp.ones((1, 16)))
    with pytest.raises(ValueError, match=rf"smoothquant: {path} is a LowRank"):
        smoothed("gpt2", unflatten(flat))


def test_inputs_that_are_always_zero():
    """A dead channel of a norm keeps a scale of 1."""
    flat = flatten(model_of("llama")[1])
    flat["layers_0/attention_norm/scale"] = flat["layers_0/attention_norm/scale"].at[5].set(0.0)
    new = smoothed("llama", unflatten(flat))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    before = flat["layers_0/attention/key/kernel"][5]
    assert np.array_equal(new["layers_0"]["attention"]["key"]["kernel"][5], before)
