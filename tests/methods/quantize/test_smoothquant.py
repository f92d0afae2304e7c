"""SmoothQuant: the same function in every family, folded where that is valid, and what quantization gains by it."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

from jaxlm.core import Calibration, FakeQuant, InputScaled, Masked, SurgeryContext, flatten, map_leaves, unflatten
from jaxlm.io.lm import LM
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.quantize.smoothquant import AFTER_NORMS, smooth_scale, smoothquant
from jaxlm.models import model_config
from jaxlm.models.network import Network

pytestmark = pytest.mark.slow

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
def lm_of(family):
    """A model with random norms and biases."""
    lm = LM.initialize(model_config(family, **SIZES, **MODELS[family]), jax.random.key(0))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return lm.replace(params=map_leaves(noise, lm.params))


def set_leaves(lm, leaves):
    """The model with these leaves, by path, in the place of its own."""
    return lm.replace(params=unflatten(flatten(lm.params) | leaves))


def with_outliers(lm):
    """The same function with an outlying channel: thirty times as large behind norms, a thirtieth in what reads it."""
    flat = flatten(lm.params)
    for path in flat:
        if "layers_" in path and "norm/" in path:
            flat[path] = flat[path].at[3].multiply(30.0)
        elif re.fullmatch(AFTER_NORMS, path):
            flat[path] = flat[path].at[3].divide(30.0)
    return lm.replace(params=unflatten(flat))


def batch_of(lm):
    return BATCH | {"decoder_input_ids": BATCH["input_ids"][:, ::-1]} if lm.config.encoder_decoder else BATCH


CONTEXT = SurgeryContext(read_calibration=lambda lm: Calibration([batch_of(lm)]))
EVERYTHING = r".*layers_\d+/.*/kernel"


@functools.cache
def smoothed(family, everything=False):
    options = {"fold": False, "targets": EVERYTHING, "alpha": 0.7} if everything else {}
    return smoothquant(lm_of(family), CONTEXT, **options)


@functools.cache
def _forward(config):
    return jax.jit(Network(config).forward, compiler_options=QUICK)


def logits(lm):
    return np.asarray(_forward(lm.config)(lm.params, batch_of(lm))["logits"])


@pytest.mark.parametrize(("family", "everything"), [*((f, False) for f in MODELS), ("t5", True), ("llama", True)])
def test_the_function_stays(family, everything):
    lm, smooth = lm_of(family), smoothed(family, everything)
    expected = logits(lm)
    assert np.abs(logits(smooth) - expected).max() <= 1e-5 * np.abs(expected).max()
    old = flatten(lm.params)
    changed = [path for path, leaf in flatten(smooth.params).items() if leaf is not old[path]]
    assert any(path.endswith("query/kernel") for path in changed)


def input_scaled(lm):
    """Paths of the leaves whose scale was not folded."""
    return {path for path, leaf in flatten(lm.params).items() if isinstance(leaf, InputScaled)}


def test_folding_is_only_where_it_is_valid():
    scaled = {family: input_scaled(smoothed(family)) for family in MODELS}
    assert not scaled["gpt2"] and not scaled["llama"] and not scaled["t5"], "every norm is read by one group alone"
    products = ("attention/query", "attention/key", "attention/value", "mlp/up")
    assert scaled["bert"] == {f"layers_{i}/{p}/kernel" for i in range(2) for p in products}
    kept = {path.split("/", 2)[2] for path in input_scaled(smoothquant(lm_of("t5"), CONTEXT, targets=EVERYTHING))}
    crossing = {f"cross_attention/{p}/kernel" for p in ("key", "value", "output")}
    assert kept == {"attention/output/kernel", "mlp/down/kernel"} | crossing


def test_products_that_share_an_input_share_the_scale():
    before, after = (lm.params["layers_1"]["attention"] for lm in (lm_of("bert"), smoothed("bert")))
    scale = np.asarray(after["query"]["kernel"].scale)
    for name in ("query", "key", "value"):
        assert np.array_equal(after[name]["kernel"].scale, scale)
        assert np.allclose(after[name]["kernel"].base, np.asarray(before[name]["kernel"]) / scale[:, None], rtol=1e-5)


def test_the_ranges_are_equal_at_one_half():
    """max|x|/s and s·max|W| are both sqrt(max|x| max|W|)."""
    x, w = jnp.array([100.0, 1.0, 0.0]), jnp.array([0.04, 2.0, 1.0])
    s = smooth_scale(x, w, 0.5)
    assert np.allclose(x / s, s * w * (x > 0), rtol=1e-5) and s[2] == 1
    assert np.allclose(smooth_scale(x, w, 1.0)[:2], x[:2]) and np.allclose(smooth_scale(x, w, 0.0)[:2], 1 / w[:2])


def fake_quantized(lm):
    """Every kernel and its inputs quantized to int8, below the scaling where there is one."""
    wrap = lambda leaf: FakeQuant.of(leaf, dynamic=True)  # noqa: E731

    def quantize(path, leaf):
        if "layers_" not in path or not path.endswith("kernel"):
            return leaf
        return leaf.replace(base=wrap(leaf.base)) if isinstance(leaf, InputScaled) else wrap(leaf)

    return lm.replace(params=map_leaves(quantize, lm.params))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_quantized_inputs_are_closer(family):
    lm, exact = with_outliers(lm_of(family)), logits(lm_of(family))
    error = lambda lm: np.linalg.norm(logits(fake_quantized(lm)) - exact)  # noqa: E731
    assert np.abs(logits(lm) - exact).max() < 1e-4
    assert error(smoothquant(lm, CONTEXT)) < 0.5 * error(lm)


def test_masks_stay():
    lm, path = lm_of("llama"), "layers_0/mlp/up/kernel"
    mask = jnp.arange(16 * 12).reshape(16, 12) % 2 == 0
    masked = set_leaves(lm, {path: Masked(jnp.where(mask, flatten(lm.params)[path], 0), mask)})
    leaf = flatten(smoothquant(masked, CONTEXT).params)[path]
    assert isinstance(leaf, Masked) and np.array_equal(leaf.mask, mask) and not np.asarray(leaf.base)[~mask].any()


def test_refused():
    lm, path = lm_of("gpt2"), "layers_1/attention/key/kernel"
    with pytest.raises(ValueError, match="smoothquant: alpha must be in"):
        smoothquant(lm, CONTEXT, alpha=1.5)
    leaf = LowRank(flatten(lm.params)[path], jnp.ones((16, 1)), jnp.ones((1, 16)))
    with pytest.raises(ValueError, match=rf"smoothquant: {path} is a LowRank"):
        smoothquant(set_leaves(lm, {path: leaf}), CONTEXT)


def test_inputs_that_are_always_zero():
    """A dead channel of a norm keeps a scale of 1."""
    lm, path = lm_of("llama"), "layers_0/attention_norm/scale"
    smooth = smoothquant(set_leaves(lm, {path: flatten(lm.params)[path].at[5].set(0.0)}), CONTEXT)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(smooth.params))
    before, after = (tree["layers_0"]["attention"]["key"]["kernel"] for tree in (lm.params, smooth.params))
    assert np.array_equal(after[5], before[5])
