"""Learned ranges: LSQ's steps and PACT's clipping against their formulas and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Quantized, Scheme, components, dot, materialize
from jaxlm.core.weights.scheme import spread
from jaxlm.methods.quantize.learned import LSQ, PACT, learned_clip, learned_step

pytestmark = pytest.mark.slow

SCHEMES = [Scheme("int4"), Scheme("int3", 5), Scheme("int8", "tensor")]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("axis", [-2, -1])
def test_lsq_gradients_are_the_papers(scheme, axis):
    w, r = normal(0, 12, 6), np.asarray(normal(1, 12, 6), np.float64)
    step = LSQ.of(w, scheme, channel=-3 - axis).scale * 0.4  # so that some weights lie outside
    loss = lambda w, s: jnp.sum(learned_step(w, s, scheme, axis) * r.astype(np.float32))  # noqa: E731
    dw, ds = jax.grad(loss, (0, 1))(w, step)
    wide = np.asarray(jnp.broadcast_to(spread(step, w.shape[axis], scheme, axis), w.shape), np.float64)
    v, q = np.asarray(w, np.float64) / wide, scheme.largest
    inside = np.abs(v) <= q
    assert 0 < inside.mean() < 1 or scheme.bits == "int8"
    assert np.allclose(dw, r * inside, rtol=1e-5)
    per_entry = r * np.where(inside, np.rint(v) - v, np.sign(v) * q)
    if scheme.group == "tensor":
        summed = per_entry.sum(keepdims=True)
    elif scheme.group is None:
        summed = per_entry.sum(axis, keepdims=True)
    else:
        summed = np.add.reduceat(per_entry, np.arange(0, per_entry.shape[axis], 5), axis=axis)
    shared = w.size / step.size
    assert ds.shape == step.shape
    assert np.allclose(ds, summed / np.sqrt(shared * q), rtol=1e-4, atol=1e-4)


def test_lsq_gradients_of_its_smooth_parts_by_finite_differences():
    """Between two roundings `ŵ(s) = q s`, and outside `±Q s`: differences of the value itself."""
    scheme, step = Scheme("int4"), 0.3
    value = lambda w, s: learned_step(jnp.full((1, 1), w), jnp.full((1, 1), s), scheme)[0, 0]  # noqa: E731
    factor = 1 / np.sqrt(scheme.largest)
    for w in (9.0, -9.0):  # outside: the straight-through part is zero, the difference is the derivative
        slope = (value(w, step + 1e-2) - value(w, step - 1e-2)) / 2e-2
        assert jax.grad(value, 1)(w, step) == pytest.approx(float(slope * factor), rel=1e-4)
    for w in (0.5, -1.1):  # inside: the difference sees q, the estimator also what rounding took away
        slope = (value(w, step + 1e-3) - value(w, step - 1e-3)) / 2e-3
        assert jax.grad(value, 1)(w, step) == pytest.approx(float((slope - w / step) * factor), rel=1e-3)


def test_lsq_begins_at_the_papers_step_and_learns_a_better_one():
    w = normal(0, 64, 3) * jnp.array([1.0, 10.0, 0.0])
    scale = LSQ.of(w, Scheme("int4")).scale
    assert np.allclose(scale[0, :2], 2 * np.abs(w).mean(0)[:2] / np.sqrt(7), rtol=1e-5) and scale[0, 2] == 1
    w, scheme = w[:, :1], Scheme("int3")
    start = step = LSQ.of(w, scheme).scale * 3
    error = jax.jit(lambda s: jnp.mean((learned_step(w, s, scheme) - w) ** 2))
    for _ in range(60):
        step = step - 3 * jax.grad(error)(step)
    best = min(error(jnp.full((1, 1), s)) for s in np.linspace(0.1, 2, 96))
    assert error(step) < 1.2 * best < 0.3 * error(start)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-30])
def test_a_step_may_cross_zero(scale):
    w = LSQ.of(normal(0, 8, 4), Scheme("int8")).replace(scale=jnp.full((1, 4), scale))
    stored = w.quantize()
    assert np.isfinite(materialize(w)).all() and np.array_equal(materialize(w), materialize(stored))
    assert (np.asarray(stored.scale) > 0).all()
    assert np.isfinite(jax.grad(lambda s: w.replace(scale=s).materialize().sum())(w.scale)).all()


def test_learned_ranges_are_scales():
    axes = ("embed", "ffn")
    assert components(LSQ.of(normal(0, 8, 4), Scheme("int4", 2)), axes)["scale"] == (axes, "scale")
    assert components(LSQ.of(normal(0, 8, 4), channel=-2), axes)["scale"] == (("embed", None), "scale")
    assert components(PACT.of(normal(0, 8, 4)), axes)["clip"] == ((), "scale")


@pytest.mark.parametrize("symmetric", [True, False])
def test_pact_values_and_gradients(symmetric):
    scheme, alpha = Scheme("int4", "tensor", symmetric), 2.0
    x = jnp.array([[-5.0, -2.0, -0.9, -0.1, 0.0, 0.3, 1.1, 1.99, 2.0, 3.0]])
    steps, low = (7, -alpha) if symmetric else (15, 0.0)
    exact = np.rint(np.clip(np.asarray(x), low, alpha) * steps / alpha) * alpha / steps
    assert np.allclose(learned_clip(x, jnp.float32(alpha), scheme), exact, atol=1e-6)
    r = normal(0, 1, 10)
    dx, da = jax.grad(lambda x, a: jnp.sum(learned_clip(x, a, scheme) * r), (0, 1))(x, alpha)
    above, below = np.asarray(x >= alpha), np.asarray(x <= low)
    assert np.allclose(dx, r * ~(above | below), rtol=1e-6)
    assert da == pytest.approx(float(np.sum(r * above) - symmetric * np.sum(r * below)), rel=1e-5)


def test_pact_gradient_of_the_clip_by_finite_differences():
    """Where inputs are far outside, the value is `±α` to the last code: its difference is the derivative."""
    scheme, x = Scheme("int8", "tensor"), jnp.array([[50.0, 60.0, -70.0, 80.0]])
    value = lambda a: learned_clip(x, jnp.float32(a), scheme).sum()  # noqa: E731
    assert jax.grad(value)(3.0) == pytest.approx(float((value(3.1) - value(2.9)) / 0.2), rel=1e-4) == 2.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_pact_stores_static_inputs(symmetric):
    w = PACT.of(normal(0, 16, 6), activations=Scheme("int8", "tensor", symmetric), clip=1.5)
    stored = w.quantize()
    assert isinstance(stored, Quantized) and stored.activations == w.activations
    x = normal(1, 9, 16)
    assert np.allclose(dot(x, stored), dot(x, w), rtol=1e-5, atol=1e-5)
    assert np.allclose(dot(x, w)[:, 0], w.rounded(x) @ materialize(w)[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: LSQ.of(w, Scheme("nf4")), "LSQ learns the step of symmetric integers"),
        (lambda w: LSQ.of(w, Scheme("int4", None, False)), "LSQ learns the step of symmetric integers"),
        (lambda w: PACT.of(w, activations=Scheme("int8")), "one range for all inputs"),
        (lambda w: PACT.of(w, dynamic=True), "FakeQuant rounds them a token at a time"),
        (lambda w: PACT.of(w, clip=0.0), "must be positive"),
    ],
)
def test_what_cannot_be_learned(make, message):
    with pytest.raises(ValueError, match=message):
        make(jnp.ones((4, 2)))
