"""Static quantization: the ranges are those of the text, and what comes before it is inside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Factored, InputScaled, Quantized, Scheme, flatten, materialize
from jaxlm.methods.calibration import Calibration
from jaxlm.methods.factorize.svd import svd
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.methods.quantize.smoothquant import smoothquant
from jaxlm.methods.quantize.static import quantize_static
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.nn.dense import norm

RNG = np.random.default_rng(0)
# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
MODEL = Network(model_config("gpt2", vocab_size=19, hidden_size=16, num_layers=1, num_heads=4, max_positions=8))
PARAMS = MODEL.init(jax.random.key(0))
BATCH = {"input_ids": RNG.integers(1, 19, (8, 8)), "attention_mask": np.ones((8, 8), np.int32)}
BATCH["attention_mask"][0, 3:] = 0
CALIBRATION = Calibration([BATCH])
FIRST = "layers_0/attention/query/kernel"


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(params):
    return MODEL.forward(params, BATCH)["logits"]


def logits(params):
    return np.asarray(forward(params))


def test_the_range_is_that_of_the_inputs():
    _, new, _ = quantize_static(MODEL, PARAMS, MODEL.axes(), CALIBRATION)
    leaf = flatten(new)[FIRST]
    x = norm("layer", PARAMS["layers_0"]["attention_norm"], MODEL.embed(PARAMS, BATCH).x, MODEL.config.norm_eps)
    x = np.asarray(x)[BATCH["attention_mask"] > 0]
    assert leaf.activations == Scheme("int8", "tensor", False)
    assert np.isclose(leaf.input_scale, (x.max() - x.min()) / 255, rtol=1e-5)
    assert np.abs(logits(new) - logits(PARAMS)).max() < 0.02 * np.abs(logits(PARAMS)).max()


def test_after_smoothquant_the_range_is_that_of_the_scaled_inputs():
    _, smooth, _ = smoothquant(MODEL, PARAMS, MODEL.axes(), CALIBRATION, fold=False)
    for leaf in (
        flatten(quantize_static(MODEL, smooth, MODEL.axes(), CALIBRATION)[1])[FIRST],
        flatten(quantize(MODEL, smooth, MODEL.axes())[1])[FIRST],
    ):
        assert isinstance(leaf, InputScaled) and isinstance(leaf.base, Quantized)
        assert np.abs(np.asarray(materialize(leaf)) - flatten(PARAMS)[FIRST]).max() < 1e-3
    static = flatten(quantize_static(MODEL, smooth, MODEL.axes(), CALIBRATION, input_symmetric=True)[1])[FIRST].base
    x = norm("layer", PARAMS["layers_0"]["attention_norm"], MODEL.embed(PARAMS, BATCH).x, MODEL.config.norm_eps)
    scaled = np.asarray(x * flatten(smooth)[FIRST].scale)[BATCH["attention_mask"] > 0]
    assert np.isclose(static.input_scale, np.abs(scaled).max() / 127, rtol=1e-5)


def test_after_svd_both_factors_are_rounded():
    _, small, _ = svd(MODEL, PARAMS, MODEL.axes(), size=0.5)
    leaf = flatten(quantize(MODEL, small, MODEL.axes(), bits="int4")[1])[FIRST]
    assert isinstance(leaf, Factored) and leaf.a.codes.dtype == leaf.b.codes.dtype == jnp.int4
    with pytest.raises(ValueError, match=rf"quantize_static: {FIRST} is a Factored"):
        quantize_static(MODEL, small, MODEL.axes(), CALIBRATION)


def test_formats_that_do_not_go_together():
    with pytest.raises(ValueError, match="quantize_static: inputs in int8 do not go with a weight in fp8_e4m3"):
        quantize_static(MODEL, PARAMS, MODEL.axes(), CALIBRATION, bits="fp8_e4m3")
