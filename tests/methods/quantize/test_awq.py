"""AWQ: the scale that it finds, the function that it keeps, and codes that cost less."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

from jaxlm.core import (
    Calibration,
    InputScaled,
    Masked,
    Quantized,
    SurgeryContext,
    flatten,
    map_leaves,
    materialize,
    unflatten,
)
from jaxlm.core.weights.scheme import Scheme, from_codes, grid, to_codes
from jaxlm.io.lm import LM
from jaxlm.methods.quantize.awq import awq, awq_scale, output_error, power_scale
from jaxlm.models import model_config
from jaxlm.models.network import Network

pytestmark = pytest.mark.slow

IN, OUT = 40, 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, IN)) * np.exp(1.5 * RNG.normal(size=IN))
W = RNG.normal(size=(IN, OUT)).astype(np.float32)
H, MEAN = jnp.asarray(X.T @ X, jnp.float32), jnp.asarray(np.abs(X).mean(0), jnp.float32)


def quantized(w, scale, scheme):
    """`diag(1/s) q(diag(s) W)`"""
    larger = w * np.asarray(scale)[:, None]
    steps = grid(larger, scheme)
    return np.asarray(from_codes(to_codes(larger, *steps, scheme), *steps, scheme)) / np.asarray(scale)[:, None]


@pytest.mark.parametrize("scheme", [Scheme("int4"), Scheme("int3", 8), Scheme("int4", 8, False)], ids=str)
def test_the_error_is_that_of_the_outputs(scheme):
    for alpha in (0.0, 0.4, 1.0):
        scale = power_scale(MEAN, alpha)
        expected = np.linalg.norm(X @ (W - quantized(W, scale, scheme))) ** 2
        assert np.isclose(output_error(W, H, scale, scheme), expected, rtol=1e-3)


@pytest.mark.parametrize("scheme", [Scheme("int4"), Scheme("int3"), Scheme("int4", 8)], ids=str)
def test_the_best_of_the_grid_and_better_than_round_to_nearest(scheme):
    scale, alpha = awq_scale([W], MEAN, H, scheme)
    costs = [float(output_error(W, H, power_scale(MEAN, a), scheme)) for a in np.arange(21) / 20]
    assert round(float(alpha) * 20) == int(np.argmin(costs)) and alpha > 0
    error = lambda w: np.linalg.norm(X @ (W - w))  # noqa: E731
    assert error(quantized(W, scale, scheme)) < 0.9 * error(quantized(W, np.ones(IN), scheme))


def test_scales_are_powers_of_the_mean():
    scale = np.asarray(power_scale(MEAN, 0.5), np.float64)
    assert np.isclose(scale.min() * scale.max(), 1, rtol=1e-5)
    assert np.allclose(scale / scale[0], np.sqrt(np.asarray(MEAN) / MEAN[0]), rtol=1e-5)
    assert np.array_equal(power_scale(MEAN, 0.0), np.ones(IN))


def test_degenerate_inputs():
    for mean, moment in ((0 * MEAN, 0 * H), (MEAN.at[3].set(0), H.at[3].set(0).at[:, 3].set(0)), (MEAN, H * 1e-30)):
        scale, _ = awq_scale([W], mean, moment, Scheme("int4", 8))
        assert np.isfinite(scale).all() and (np.asarray(scale) > 0).all()


# In a model -----------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "ffn_size": 24, "num_heads": 4}
MODELS = {"llama": {"num_kv_heads": 2}, "bert": {"max_positions": 8}, "gpt2": {"max_positions": 8}}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 19, (8, 6)),
    "attention_mask": (np.arange(6) < np.array([[6], [4], [5], [6]] * 2)).astype(np.int32),
}
CONTEXT = SurgeryContext(read_calibration=lambda lm: Calibration([BATCH]))


@functools.cache
def lm_of(family):
    """A model with random biases and norms whose channels are of unequal size."""
    lm = LM.initialize(model_config(family, **SIZES, **MODELS[family]), jax.random.key(0))
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    flat = flatten(map_leaves(noise, lm.params))
    for path in flat:
        if path.endswith("norm/scale"):
            flat[path] = flat[path] * np.exp(np.random.default_rng(5).normal(size=16))
    return lm.replace(params=unflatten(flat))


@functools.cache
def _forward(config):
    return jax.jit(Network(config).forward, compiler_options=QUICK)


def logits(lm):
    values = _forward(lm.config)(lm.params, BATCH)["logits"]
    return np.asarray(values)[BATCH["attention_mask"] > 0]


def run_awq(lm, **options):
    return awq(lm, CONTEXT, bits="int4", group=8, **options)


@pytest.mark.parametrize("family", MODELS)
def test_the_function_stays_before_quantization(family):
    lm = lm_of(family)
    scaled, exact = run_awq(lm, rounded=False), logits(lm)
    assert np.abs(logits(scaled) - exact).max() <= 1e-5 * np.abs(exact).max()
    inside = {path.split("/", 1)[1] for path, leaf in flatten(scaled.params).items() if isinstance(leaf, InputScaled)}
    always = {"attention/output/kernel", "mlp/down/kernel"}
    post = {f"attention/{n}/kernel" for n in ("query", "key", "value")} | {"mlp/up/kernel"}
    assert inside == (always | post if family == "bert" else always)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_codes_cost_less_than_round_to_nearest(family):
    lm = lm_of(family)
    aware, exact = run_awq(lm), logits(lm)
    leaves = flatten(aware.params)
    kernels = {path: leaf for path, leaf in leaves.items() if "layers_" in path and path.endswith("kernel")}
    cores = [leaf.base if isinstance(leaf, InputScaled) else leaf for leaf in kernels.values()]
    assert all(isinstance(core, Quantized) and core.scheme == Scheme("int4", 8) for core in cores)
    plain = map_leaves(
        lambda path, leaf: materialize(Quantized.of(leaf, Scheme("int4", 8))) if path in kernels else leaf, lm.params
    )
    error = lambda lm: np.linalg.norm(logits(lm) - exact)  # noqa: E731
    assert error(aware) < error(lm.replace(params=plain))


def test_masks_stay():
    lm = lm_of("llama")
    flat = flatten(lm.params)
    path = "layers_0/mlp/down/kernel"
    mask = jnp.arange(24 * 16).reshape(24, 16) % 2 == 0
    flat[path] = Masked(jnp.where(mask, flat[path], 0), mask)
    leaf = flatten(run_awq(lm.replace(params=unflatten(flat))).params)[path]
    assert isinstance(leaf.base, Masked) and isinstance(leaf.base.base, Quantized)
    assert not np.asarray(materialize(leaf))[~np.asarray(mask)].any()
