"""Sums over the labels that count, and the numbers of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses.cross_entropy import IGNORED, cross_entropy, log_likelihood, squared_error


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]))
    term = cross_entropy(logits, jnp.array([0, IGNORED, 2]))
    assert np.isclose(term.sum, -np.log(0.5) - np.log(0.4), rtol=1e-6) and term.weight == 2


def test_gradient_is_probability_minus_label_and_zero_where_ignored():
    logits = jax.random.normal(jax.random.key(0), (4, 5, 7))
    labels = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, (4, 5)), 3, IGNORED)
    gradient = jax.grad(lambda x: cross_entropy(x, labels).sum)(logits)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(3, 7)) * (labels >= 0)[..., None]
    assert np.allclose(gradient, expected, atol=1e-6) and not np.asarray(gradient)[np.asarray(labels) < 0].any()


def test_logits_of_any_size():
    """A shift changes nothing and large logits do not overflow."""
    logits, labels = jax.random.normal(jax.random.key(0), (3, 6)), jnp.array([0, 1, 2])
    assert np.isclose(cross_entropy(logits + 1e4, labels).sum, cross_entropy(logits, labels).sum, rtol=1e-2)
    assert np.isclose(cross_entropy(1e4 * jax.nn.one_hot(labels, 6), labels).sum, 0)


def test_bfloat16_is_summed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (2000, 8)).astype(jnp.bfloat16)
    labels = jnp.zeros(2000, jnp.int32)
    term = cross_entropy(logits, labels)
    assert term.sum.dtype == jnp.float32
    assert np.isclose(term.sum, cross_entropy(logits.astype(jnp.float32), labels).sum, rtol=1e-6)


def test_likelihood_is_zero_where_nothing_is_predicted():
    likelihood, valid = log_likelihood(jnp.ones((3, 4)), jnp.array([IGNORED, 1, IGNORED]))
    assert valid.tolist() == [0, 1, 0] and likelihood[0] == likelihood[2] == 0 and likelihood[1] < 0


def test_squared_error_leaves_out_rows_without_target():
    targets = jnp.array([1.0, jnp.nan, -1.0])
    f = lambda p: squared_error(p, targets).sum  # noqa: E731
    value, gradient = jax.value_and_grad(f)(jnp.array([2.0, 5.0, 1.0]))
    assert value == 5.0 and gradient.tolist() == [2.0, 0.0, 4.0] and squared_error(targets, targets).weight == 2
