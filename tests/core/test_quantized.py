"""Number formats, and integer products of their codes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Quantized, Scheme, dot, materialize
from jaxlm.core.weights import integer
from jaxlm.core.weights.integer import integer_product, scaled_product
from jaxlm.core.weights.scheme import FORMATS, INTEGERS, NF4, from_codes, grid, straight_through, to_codes

pytestmark = pytest.mark.slow

SYMMETRIC = [Scheme(bits, group) for bits in FORMATS for group in (None, 7, "tensor")]
ASYMMETRIC = [Scheme(bits, group, False) for bits in INTEGERS for group in (None, 7, "tensor")]
schemes = pytest.mark.parametrize("scheme", SYMMETRIC + ASYMMETRIC, ids=str)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def outliers(seed, *shape):
    """Columns and rows of very different size: where a finer granularity pays."""
    return normal(seed, *shape) * jnp.exp(normal(seed + 1, shape[0], 1)) * jnp.exp(2 * normal(seed + 2, 1, shape[1]))


def error(w, scheme, axis=-2):
    scale, zero = grid(w, scheme, axis)
    return float(jnp.linalg.norm(from_codes(to_codes(w, scale, zero, scheme, axis), scale, zero, scheme, axis) - w))


# Formats -------------------------------------------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("axis", [-2, -1])
def test_rounding_is_to_the_nearest_number_of_the_format(scheme, axis):
    """Against every number that the format has, group by group."""
    w = np.asarray(outliers(0, 16, 6) if axis == -2 else outliers(0, 16, 6).T)
    scale, zero = grid(jnp.asarray(w), scheme, axis)
    codes = to_codes(jnp.asarray(w), scale, zero, scheme, axis)
    values = np.asarray(from_codes(codes, scale, zero, scheme, axis), np.float64)
    assert codes.dtype == scheme.dtype and codes.shape == w.shape
    if scheme.bits in INTEGERS:
        b = INTEGERS[scheme.bits]
        numbers = np.arange(-(2 ** (b - 1)) + scheme.symmetric, 2 ** (b - 1)).astype(np.float64)
    elif scheme.bits == "nf4":
        numbers = NF4.astype(np.float64)
    else:
        numbers = np.arange(256, dtype=np.uint8).view(scheme.dtype).astype(np.float64)
        numbers = np.unique(numbers[np.isfinite(numbers)])
    flip = (lambda a: a) if axis == -2 else np.transpose
    w, values = flip(w), flip(values)
    scale = np.asarray(flip(scale), np.float64)
    zero = np.zeros_like(scale) if zero is None else np.asarray(flip(zero), np.float64)
    for row in range(w.shape[0]):
        group = row // 7 if scheme.group == 7 else 0
        for column in range(w.shape[1]):
            at = group, column if scale.shape[1] > 1 else 0
            representable = (numbers - zero[at]) * scale[at]
            nearest = np.abs(representable - w[row, column]).min()
            assert abs(values[row, column] - w[row, column]) <= nearest + 1e-5 * scale[at] * max(abs(numbers).max(), 1)


@pytest.mark.parametrize("bits", FORMATS)
def test_finer_granularity_errs_less(bits):
    w = outliers(3, 64, 24)
    group, channel, tensor = (error(w, Scheme(bits, g)) for g in (8, None, "tensor"))
    assert group < channel < tensor
    if bits in INTEGERS:
        assert error(w + 1, Scheme(bits, None, False)) < error(w + 1, Scheme(bits))


def test_more_bits_err_less():
    w = normal(0, 64, 24)
    errors = [error(w, Scheme(f"int{b}", 8)) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert error(w, Scheme("nf4", 32)) < error(w, Scheme("int4", 32))  # made for normal weights
    assert error(w, Scheme("int8")) < error(w, Scheme("fp8_e4m3")) < error(w, Scheme("fp8_e5m2"))


@schemes
@pytest.mark.parametrize("kind", ["zero", "constant", "negative constant", "positive", "negative"])
def test_degenerate_ranges(scheme, kind):
    """All zero, constant, of one sign: finite, zero stays zero, and a constant is exact."""
    value = {"zero": 0.0, "constant": 3.7, "negative constant": -3.7, "positive": 5 + jnp.abs(normal(0, 9, 2))}
    w = jnp.broadcast_to(value.get(kind, -value["positive"]), (9, 2))
    scale, zero = grid(w, scheme)
    codes = to_codes(w, scale, zero, scheme)
    again = from_codes(codes, scale, zero, scheme)
    assert np.isfinite(scale).all() and (np.asarray(scale) > 0).all() and np.isfinite(again).all()
    if len(set(w.ravel().tolist())) == 1:
        assert np.allclose(again, w, rtol=1e-6)
    zeros = from_codes(to_codes(0 * w, scale, zero, scheme), scale, zero, scheme)
    assert not np.asarray(zeros).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_group_can_be_encoded_alone(symmetric):
    scheme, w = Scheme("int3", 6, symmetric), normal(0, 16, 5)
    scale, zero = grid(w, scheme)
    codes = to_codes(w, scale, zero, scheme)
    assert scale.shape == (3, 5)
    for row in range(16):
        group = slice(row // 6, row // 6 + 1)
        alone = to_codes(w[row : row + 1], scale[group], None if zero is None else zero[group], scheme)
        assert np.array_equal(alone, codes[row : row + 1])
    sub_scale, sub_zero = grid(w[6:12], Scheme("int3", None, symmetric))
    assert np.array_equal(sub_scale, scale[1:2]) and (zero is None or np.array_equal(sub_zero, zero[1:2]))


def test_nf4_is_the_published_table():
    """Against the quantiles of N(0, 1) that define it: eight positive ones, seven negative ones and 0."""
    from statistics import NormalDist

    offset, quantile = 0.9677083, NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.array(sorted([*positive, 0.0, *negative]))
    assert np.allclose(values / values.max(), NF4, atol=1e-5)
    codes = to_codes(jnp.asarray(NF4)[:, None], jnp.ones((1, 1)), None, Scheme("nf4"))
    assert codes.ravel().tolist() == list(range(-8, 8))


@pytest.mark.parametrize(("bits", "dtype"), [("fp8_e4m3", jnp.float8_e4m3fn), ("fp8_e5m2", jnp.float8_e5m2)])
def test_float8_is_the_cast(bits, dtype):
    w = normal(0, 32, 8)
    scale, _ = grid(w, Scheme(bits))
    codes = to_codes(w, scale, None, Scheme(bits))
    assert np.array_equal(codes.astype(jnp.float32), (w / scale).astype(dtype).astype(jnp.float32))
    assert np.isfinite(to_codes(1e6 * w, scale, None, Scheme(bits)).astype(jnp.float32)).all(), "it saturates"
    assert np.array_equal(from_codes(codes, scale, None, Scheme(bits)), codes.astype(jnp.float32) * scale)


def test_four_bits_take_half_a_byte_in_memory():
    for dtype, size in ((Scheme("int3").dtype, 32), (Scheme("nf4").dtype, 32), (Scheme("int8").dtype, 64)):
        plan = jax.jit(lambda dtype=dtype: jnp.zeros((8, 8), dtype)).lower().compile().memory_analysis()
        assert plan.output_size_in_bytes == size


def test_straight_through_is_one_inside_and_zero_outside():
    scale = jnp.full((1, 1), 0.1)
    x = jnp.array([-12.8, -12.71, -12.69, -0.26, 0.0, 12.65, 12.69, 12.75, 40.0])
    fake = lambda x: straight_through(x.reshape(1, 1), scale, None, Scheme("int8")).sum()  # noqa: E731
    value, gradient = jax.vmap(jax.value_and_grad(fake))(x)
    assert gradient.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert np.allclose(value, [-12.7, -12.7, -12.7, -0.3, 0, 12.6, 12.7, 12.7, 12.7], atol=1e-5)


@schemes
def test_what_sets_a_range_learns(scheme):
    """It sits on the border of the range, where rounding must not decide whether its gradient passes."""
    w = normal(5, 64, 100) + 0.5
    scale, zero = grid(w, scheme)
    gradient = jax.grad(lambda w: straight_through(w, scale, zero, scheme).sum())(w)
    assert np.array_equal(gradient, np.ones_like(gradient))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": "in4"}, "unknown number format 'in4'; did you mean 'int4'"),
        ({"bits": 4}, "unknown number format '4'; known: fp8_e4m3"),
        ({"group": 0}, "give a number of inputs"),
        ({"group": "channel"}, "give a number of inputs"),
        ({"bits": "nf4", "symmetric": False}, "nf4 is symmetric by construction"),
    ],
)
def test_wrong_schemes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": Scheme("nf4"), "dynamic": True}, "nf4 codes are places in a table"),
        ({"scheme": Scheme("fp8_e4m3"), "activations": Scheme("int8")}, "cannot be multiplied|do not go with"),
        ({"activations": Scheme("int8", 4)}, "not one a group"),
        ({"activations": Scheme("int8", "tensor")}, "give both or neither"),
        ({"input_range": (0, 1)}, "give both or neither"),
    ],
)
def test_formats_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantized.of(jnp.ones((4, 2)), **arguments)


# Products ------------------------------------------------------------------------------------------------------------


def codes_of(seed, *shape, largest=127):
    return jax.random.randint(jax.random.key(seed), shape, -largest, largest + 1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (7, 16), (8, 16), (64, 1024), (64, 1025)])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_products_are_exact(rows, inputs, bits, fast, monkeypatch):
    """In every form, up to the largest sums that bfloat16 operands may have, where each code is the largest."""
    monkeypatch.setattr(integer, "fast_bfloat16", lambda: fast)
    largest = 2 ** (bits - 1) - 1
    x, w = codes_of(rows, rows, inputs).astype(jnp.int8), codes_of(99, inputs, 3, largest=largest)
    x, w = x.at[0].set(127), w.at[:, 0].set(largest).at[:, 1].set(-largest)
    w = w.astype(jnp.int4 if bits == 4 else jnp.int8)
    exact = np.asarray(x, np.int64) @ np.asarray(w).astype(np.int64)
    product = jax.jit(lambda x, w: integer_product(x, w, largest=largest + 1))(x, w)
    assert product.dtype == jnp.int32 and np.array_equal(product, exact)
    transposed = jax.jit(lambda x, w: integer_product(x, w, axis=-1, largest=largest + 1))(x, w.T)
    assert np.array_equal(transposed, exact)


@pytest.mark.parametrize("group", [None, 6, "tensor"])
@pytest.mark.parametrize("zeros", ["none", "weight", "inputs", "both"])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("platform", ["cpu", "other"])
def test_zero_points_and_groups_in_integers(group, zeros, axis, platform, monkeypatch):
    """`Σ (x - z_x)(c - z) s` by hand; also in the form of platforms other than this one, whose sums are integers."""
    if platform == "other":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **platforms: default(*args))
    scheme = Scheme("int8", group, zeros not in ("weight", "both"))
    w = normal(0, 16, 5) + 1
    w = w if axis == -2 else w.T
    scale, zero = grid(w, scheme, axis)
    codes = to_codes(w, scale, zero, scheme, axis)
    x = codes_of(1, 3, 16).astype(jnp.int8)
    x_zero = jnp.array([[-128], [5], [127]], jnp.int8) if zeros in ("inputs", "both") else None
    dense = np.asarray(from_codes(codes, scale, zero, scheme, axis), np.float64)
    inputs = np.asarray(x, np.float64) - (0 if x_zero is None else np.asarray(x_zero, np.float64))
    exact = inputs @ (dense if axis == -2 else dense.T)
    product = scaled_product(x, x_zero, codes, scale, zero, scheme, axis)
    assert np.allclose(product, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_are_rounded_a_token_at_a_time(symmetric):
    """Codes by hand; a token's result does not depend on its neighbours."""
    activations = Scheme("int8", None, symmetric)
    w = Quantized.of(normal(0, 16, 6), activations=activations)
    x = jnp.concatenate([100 * normal(1, 1, 16), normal(2, 3, 16) + 3])
    low, high = np.minimum(np.asarray(x).min(1, keepdims=True), 0), np.asarray(x).max(1, keepdims=True)
    scale = np.abs(np.asarray(x)).max(1, keepdims=True) / 127 if symmetric else (np.maximum(high, 0) - low) / 255
    zero = 0 if symmetric else np.rint(-128 - low / scale)
    codes = np.clip(np.rint(np.asarray(x) / scale) + zero, -127 - (not symmetric), 127)
    exact = (codes - zero) * scale @ np.asarray(materialize(w), np.float64)
    assert np.allclose(dot(x, w), exact, rtol=1e-5, atol=1e-4)
    assert np.allclose(dot(x, w)[1:], dot(x[1:], w), rtol=1e-6)


def test_static_inputs_use_the_range_that_was_measured():
    w = Quantized.of(normal(0, 16, 6), activations=Scheme("int8", "tensor", False), input_range=(-1.0, 3.0))
    assert w.input_scale.item() == pytest.approx(4 / 255) and w.input_zero.item() == round(-128 + 1 / (4 / 255))
    x = jnp.stack([jnp.full(16, 99.0), jnp.full(16, -99.0)])
    near = np.asarray(dot(x, w)) / np.asarray(materialize(w)).sum(0)
    assert np.allclose(near[0], 3.0, atol=0.02) and np.allclose(near[1], -1.0, atol=0.02)
    assert not jax.grad(lambda x: dot(x, w).sum())(x).any(), "clipped inputs have no gradient"


def test_derivatives_cost_no_product_that_is_not_needed():
    """With frozen scales, the gradient in x is one product; the forward pass stays in integers."""
    w = Quantized.of(normal(0, 16, 6), dynamic=True)
    text = str(jax.make_jaxpr(jax.grad(lambda x: w.dot(x, Context()).sum()))(normal(1, 4, 16)))
    assert "int32" in text or "i32" in text


# A second implementation ---------------------------------------------------------------------------------------------


def test_codes_of_qwix():
    """Codes and scales that qwix 0.1.8 gives for the same matrix (written by qwix_codes.py), exact in float32.

    Its symmetric integers reach from -(Q + 1/2) to Q + 1/2, so its scale is jaxlm's times Q / (Q + 1/2); codes are
    compared on its scale. Its asymmetric integers, float8 and nf4 have the same scales to the last bits.
    """
    reference = json.loads(Path(__file__).with_name("qwix_codes.json").read_text())
    w = jnp.asarray(reference["w"], jnp.float32) / 16
    for bits, group, symmetric, scale, zero, codes in reference["cases"]:
        scheme = Scheme(bits, group, symmetric)
        grid_scale, grid_zero = grid(w, scheme)
        if symmetric and bits in INTEGERS:
            grid_scale = grid_scale * scheme.largest / (scheme.largest + 0.5)
        assert np.allclose(grid_scale, np.array(scale), rtol=1e-6)
        assert (grid_zero is None) == (zero is None) and (zero is None or grid_zero.tolist() == zero)
        quantized = to_codes(w, jnp.asarray(scale, jnp.float32), grid_zero, scheme)
        numbers = quantized.astype(jnp.float32) if "fp8" in bits else quantized.astype(jnp.int32) + 8 * (bits == "nf4")
        assert numbers.tolist() == codes, (bits, group, symmetric)
