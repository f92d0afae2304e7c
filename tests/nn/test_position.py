"""Rotary embeddings against complex numbers, their scalings and T5's buckets against independent loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.layer import Rotary
from jaxlm.nn.position import frequencies, relative_bucket, rotate

SCALINGS = [
    Rotary(),
    Rotary(theta=500.0, scaling="linear", factor=4.0),
    Rotary(
        theta=50.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    ),
]


def by_hand(rotary, d):
    """Frequency by frequency, in Python floats; llama3 by wavelengths, as the model's paper states it."""
    result = []
    for i in range(d // 2):
        f = rotary.theta ** (-2 * i / d)
        if rotary.scaling == "linear":
            f /= rotary.factor
        elif rotary.scaling == "llama3":
            wavelength, n = 2 * math.pi / f, rotary.original_max_positions
            if wavelength > n / rotary.low_freq_factor:
                f /= rotary.factor
            elif wavelength >= n / rotary.high_freq_factor:
                smooth = (n / wavelength - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
                f = (1 - smooth) * f / rotary.factor + smooth * f
        result.append(f)
    return result


@pytest.mark.parametrize("rotary", SCALINGS, ids=lambda r: r.scaling)
def test_frequencies(rotary):
    expected = by_hand(rotary, 16)
    assert np.allclose(frequencies(rotary, 16), expected, rtol=1e-6)
    if rotary.scaling == "llama3":  # all three regimes
        plain = by_hand(Rotary(theta=50.0), 16)
        ratios = [round(a / b, 6) for a, b in zip(expected, plain, strict=True)]
        assert ratios[0] == 1 and ratios[-1] == 1 / 8 and any(1 / 8 < r < 1 for r in ratios)


@pytest.mark.parametrize("rotary", SCALINGS, ids=lambda r: r.scaling)
@pytest.mark.parametrize("heads", [(3,), (2, 2)])
def test_rotation_is_multiplication_with_a_complex_number(rotary, heads):
    x = np.random.default_rng(0).normal(size=(2, 5, *heads, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 100, 3, 3]])
    z = x[..., :4] + 1j * x[..., 4:]
    angles = positions[..., None] * np.array(by_hand(rotary, 8))
    turned = z * np.exp(1j * angles).reshape(2, 5, *(1,) * len(heads), 4)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    assert np.allclose(rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rotary), expected, atol=1e-4)


def test_scores_depend_on_the_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))
    at = lambda x, p: rotate(x, jnp.array([[p]]), Rotary())  # noqa: E731
    scores = [float(jnp.sum(at(q, p + 5) * at(k, p))) for p in (0, 3, 40)]
    assert np.allclose(scores, scores[0], atol=1e-5) and not np.isclose(scores[0], float(jnp.sum(q * k)), atol=1e-3)


def bucket_by_hand(distance, causal, buckets, max_distance):
    """In exact integers: the far bucket e + k begins where d^(n-e) reaches max^k · e^(n-e-k)."""
    offset = 0
    if causal:
        distance = max(-distance, 0)
    else:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    n = buckets - exact
    far = sum(distance**n >= max_distance**k * exact ** (n - k) for k in range(1, n + 1))
    return offset + min(exact + far, buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (8, 20), (32, 256)])
def test_buckets(causal, buckets, max_distance):
    distances = np.arange(-2 * max_distance, 2 * max_distance + 1)
    expected = [bucket_by_hand(int(d), causal, buckets, max_distance) for d in distances]
    numbers = relative_bucket(jnp.asarray(distances), causal, buckets, max_distance)
    assert numbers.tolist() == expected
    assert set(expected) == set(range(buckets)) - (set() if causal else {buckets // 2})  # no distance is +0
