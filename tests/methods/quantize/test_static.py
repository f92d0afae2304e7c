"""Static quantization: the ranges are those of the text, and what comes before it is inside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

from jaxlm.core import Calibration, Factored, InputScaled, Quantized, Scheme, SurgeryContext, flatten, materialize
from jaxlm.io.lm import LM
from jaxlm.methods.factorize.svd import svd
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.methods.quantize.smoothquant import smoothquant
from jaxlm.methods.quantize.static import quantize_static
from jaxlm.models import model_config
from jaxlm.nn.dense import norm

RNG = np.random.default_rng(0)
DENSE = LM.initialize(
    model_config("gpt2", vocab_size=19, hidden_size=16, num_layers=1, num_heads=4, max_positions=8), jax.random.key(0)
)
BATCH = {"input_ids": RNG.integers(1, 19, (8, 8)), "attention_mask": np.ones((8, 8), np.int32)}
BATCH["attention_mask"][0, 3:] = 0
CONTEXT = SurgeryContext(read_calibration=lambda lm: Calibration([BATCH]))
FIRST = "layers_0/attention/query/kernel"


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(params):
    return DENSE.network.forward(params, BATCH)["logits"]


def logits(lm):
    return np.asarray(forward(lm.params))


def kernel(lm):
    """The leaf of the query of the only layer."""
    return flatten(lm.params)[FIRST]


def inputs():
    """What that product reads, `[batch, length, in]`."""
    x = DENSE.network.embed(DENSE.params, BATCH).x
    return norm("layer", DENSE.params["layers_0"]["attention_norm"], x, DENSE.config.norm_eps)


def test_the_range_is_that_of_the_inputs():
    small = quantize_static(DENSE, CONTEXT)
    x = np.asarray(inputs())[BATCH["attention_mask"] > 0]
    assert kernel(small).activations == Scheme("int8", "tensor", False)
    assert np.isclose(kernel(small).input_scale, (x.max() - x.min()) / 255, rtol=1e-5)
    assert np.abs(logits(small) - logits(DENSE)).max() < 0.02 * np.abs(logits(DENSE)).max()


def test_after_smoothquant_the_range_is_that_of_the_scaled_inputs():
    smooth = smoothquant(DENSE, CONTEXT, fold=False)
    for leaf in (kernel(quantize_static(smooth, CONTEXT)), kernel(quantize(smooth))):
        assert isinstance(leaf, InputScaled) and isinstance(leaf.base, Quantized)
        assert np.abs(np.asarray(materialize(leaf)) - kernel(DENSE)).max() < 1e-3
    static = kernel(quantize_static(smooth, CONTEXT, input_symmetric=True)).base
    scaled = np.asarray(inputs() * kernel(smooth).scale)[BATCH["attention_mask"] > 0]
    assert np.isclose(static.input_scale, np.abs(scaled).max() / 127, rtol=1e-5)


def test_after_svd_both_factors_are_quantized():
    small = svd(DENSE, size=0.5)
    leaf = kernel(quantize(small, bits="int4"))
    assert isinstance(leaf, Factored) and leaf.a.codes.dtype == leaf.b.codes.dtype == jnp.int4
    with pytest.raises(ValueError, match=rf"quantize_static: {FIRST} is a Factored"):
        quantize_static(small, CONTEXT)


def test_formats_that_do_not_go_together():
    with pytest.raises(ValueError, match="quantize_static: inputs in int8 do not go with a weight in fp8_e4m3"):
        quantize_static(DENSE, CONTEXT, bits="fp8_e4m3")
