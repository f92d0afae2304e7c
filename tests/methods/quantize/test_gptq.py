"""GPTQ against round-to-nearest, and against the algorithm that updates an inverse after every weight."""

import functools

import jax
import numpy as np
import pytest
from fast_to_compile import QUICK

import jaxlm
from jaxlm.core import (
    Calibration,
    InputScaled,
    Masked,
    Quantized,
    SurgeryContext,
    flatten,
    map_leaves,
    materialize,
)
from jaxlm.core.weights.scheme import Scheme, from_codes, grid, to_codes
from jaxlm.io.lm import LM
from jaxlm.methods.prune.unstructured.sparsegpt import sparsegpt
from jaxlm.methods.quantize.gptq import gptq, gptq_matrix
from jaxlm.methods.quantize.smoothquant import smoothquant
from jaxlm.models import model_config

pytestmark = pytest.mark.slow

IN, OUT = 40, 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, IN)) * np.exp(RNG.normal(size=IN)) + RNG.normal(size=(300, 5)) @ RNG.normal(size=(5, IN)) * 2
W = RNG.normal(size=(IN, OUT)).astype(np.float32)
H = X.T @ X
SCHEMES = {
    "channel": Scheme("int4"),
    "asymmetric": Scheme("int4", symmetric=False),
    "groups": Scheme("int4", 8),
    "asymmetric groups": Scheme("int3", 8, symmetric=False),
    "a short last group": Scheme("int4", 16),
    "tensor": Scheme("int8", "tensor"),
    "nf4": Scheme("nf4", 8),
    "fp8": Scheme("fp8_e4m3"),
}


def round_to_nearest(scheme, w=W):
    scale, zero = grid(w, scheme)
    return np.asarray(from_codes(to_codes(w, scale, zero, scheme), scale, zero, scheme))


def error(w, x=X):
    return float(np.linalg.norm(x @ (W - np.asarray(w, np.float64))))


def brute_force(w, h, scheme, order, damping=0.01):
    """Optimal Brain Quantization in a fixed order, float64: before each row the inverse of what is left of H anew.

    δ of the rows to come = −(w_i − q_i) [H⁻¹]_{·i} / [H⁻¹]_{ii}.
    """
    w, h = np.array(w, np.float64), h + damping * np.diagonal(h).mean() * np.eye(len(h))
    group = scheme.group if isinstance(scheme.group, int) else None
    fixed = None if group and list(order) == list(range(len(h))) else grid(w.astype(np.float32), scheme)
    left = list(order)
    for i in order:
        if fixed is None and i % group == 0:
            steps = grid(w[i : i + group].astype(np.float32), Scheme(scheme.bits, None, scheme.symmetric))
        elif fixed is not None:
            steps = tuple(None if a is None else a[i // group : i // group + 1] if group else a for a in fixed)
        single = Scheme(scheme.bits, None, scheme.symmetric)
        codes = to_codes(w[i : i + 1].astype(np.float32), *steps, single)
        quantized = np.asarray(from_codes(codes, *steps, single), np.float64)[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        column = left.index(i)
        w[left] -= np.outer(inverse[:, column] / inverse[column, column], w[i] - quantized)
        w[i] = quantized
        left.remove(i)
    return w


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["channel", "asymmetric", "groups", "asymmetric groups"])
def test_equals_brute_force(name, act_order):
    scheme = SCHEMES[name]
    order = np.argsort(-np.diagonal(H), kind="stable") if act_order else np.arange(IN)
    ours = gptq_matrix(W, H, scheme, act_order=act_order, block=16)
    theirs = brute_force(W, H, scheme, order)
    assert np.isclose(error(ours.values), error(theirs), rtol=1e-3)
    assert (np.abs(np.asarray(ours.values) - theirs) < 1e-4).mean() > 0.99


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_grid_are_the_values(name):
    scheme = SCHEMES[name]
    quantized = gptq_matrix(W, H, scheme)
    assert quantized.codes.dtype == scheme.dtype and quantized.codes.shape == W.shape
    expected = grid(W, scheme)
    for ours, theirs in zip((quantized.scale, quantized.zero), expected, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or ours.shape == theirs.shape)
    back = from_codes(quantized.codes, quantized.scale, quantized.zero, scheme)
    assert np.allclose(back, quantized.values, rtol=1e-5, atol=1e-6)
    assert error(quantized.values) < error(round_to_nearest(scheme))


def test_the_fewer_bits_the_more_it_gains():
    gain = {}
    for bits in ("int4", "int3"):
        nearest = round_to_nearest(Scheme(bits))
        gain[bits] = error(nearest) - error(gptq_matrix(W, H, Scheme(bits)).values)
    assert 0 < gain["int4"] < gain["int3"]


def test_act_order_is_a_permutation_of_the_inputs():
    """Quantizing permuted inputs in their own order is quantizing in act order."""
    order = np.argsort(-np.diagonal(H), kind="stable")
    ours = gptq_matrix(W, H, Scheme("int4"), act_order=True)
    theirs = gptq_matrix(W[order], H[order][:, order], Scheme("int4"))
    assert np.array_equal(np.asarray(ours.values)[order], theirs.values)
    assert error(ours.values) != error(gptq_matrix(W, H, Scheme("int4")).values)


def test_without_correlation_it_is_round_to_nearest():
    quantized = gptq_matrix(W, np.diag(np.arange(1.0, IN + 1)), Scheme("int4"), damping=0.0)
    assert np.allclose(quantized.values, round_to_nearest(Scheme("int4")), atol=1e-6)


def test_zeros_stay_zero():
    mask = RNG.random(W.shape) < 0.5
    for scheme in SCHEMES.values():
        quantized = gptq_matrix(W * mask, H, scheme, mask=mask)
        assert not np.asarray(quantized.values)[~mask].any()
        back = from_codes(quantized.codes, quantized.scale, quantized.zero, scheme)
        assert not np.asarray(back)[~mask].any()


@pytest.mark.parametrize("name", ["channel", "groups", "asymmetric"])
def test_degenerate_inputs(name):
    dead = X.copy()
    dead[:, [0, 7, 39]] = 0
    for x in (dead, np.ones_like(X), X[:1]):
        quantized = gptq_matrix(W, x.T @ x, SCHEMES[name])
        assert np.isfinite(quantized.values).all() and np.isfinite(quantized.scale).all()
    assert not np.asarray(gptq_matrix(W, dead.T @ dead, SCHEMES[name]).values)[[0, 7, 39]].any()
    with pytest.raises(ValueError, match="gptq: every input of layers_1/mlp/up/kernel is 0"):
        gptq_matrix(W, 0 * H, SCHEMES[name], path="layers_1/mlp/up/kernel")


# In a model -----------------------------------------------------------------------------------------------------------

DENSE = LM.initialize(
    model_config("llama", vocab_size=19, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2), jax.random.key(0)
)
BATCH = {"input_ids": RNG.integers(1, 19, (8, 12)), "attention_mask": np.ones((8, 12), np.int32)}
CONTEXT = SurgeryContext(read_calibration=lambda lm: Calibration([BATCH]))


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(params):
    return DENSE.network.forward(params, BATCH)["logits"]


def logits(lm):
    return np.asarray(forward(lm.params))


@pytest.mark.full
def test_a_model_of_codes(tmp_path):
    small = gptq(DENSE, CONTEXT, bits="int3", group=8)
    leaf = small.params["layers_1"]["mlp"]["down"]["kernel"]
    assert isinstance(leaf, Quantized) and leaf.scheme == Scheme("int3", 8) and leaf.activations is None
    assert leaf.scale.shape == (8, 16) and small.axes == DENSE.network.axes() and small.config == DENSE.config
    chosen = [path for path, leaf in flatten(small.params).items() if isinstance(leaf, Quantized)]
    assert len(chosen) == 2 * 7
    nearest = lambda path, leaf: Quantized.of(leaf, Scheme("int3", 8)) if path in chosen else leaf  # noqa: E731
    error = lambda lm: np.linalg.norm(logits(lm) - logits(DENSE))  # noqa: E731
    assert error(small) < 0.9 * error(DENSE.replace(params=map_leaves(nearest, DENSE.params)))
    jaxlm.save(small, tmp_path / "model")
    assert np.array_equal(logits(jaxlm.load(tmp_path / "model")), logits(small))


def test_after_sparsegpt_the_zeros_stay():
    path = r"layers_0/mlp/up/kernel"
    sparse = sparsegpt(DENSE, CONTEXT, pattern="2:4", targets=path)
    both = gptq(sparse, CONTEXT, group=None, targets=path, dynamic=True)
    leaf = flatten(both.params)[path]
    assert isinstance(leaf, Masked) and isinstance(leaf.base, Quantized) and leaf.base.activations is not None
    assert (np.asarray(materialize(leaf)) == 0).mean() >= 0.5
    with pytest.raises(ValueError, match=rf"gptq: {path} is a Quantized; .* leave it out of the targets"):
        gptq(both, CONTEXT, targets=path)


def test_after_smoothquant_the_base_is_quantized():
    path = r"layers_0/mlp/up/kernel"
    smooth = smoothquant(DENSE, CONTEXT, fold=False, targets=path)
    leaf = flatten(gptq(smooth, CONTEXT, group=8, targets=path).params)[path]
    assert isinstance(leaf, InputScaled) and isinstance(leaf.base, Quantized)
    assert np.abs(np.asarray(materialize(leaf)) - flatten(DENSE.params)[path]).max() < 0.02
