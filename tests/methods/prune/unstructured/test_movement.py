"""Movement pruning: the gradient of the scores, and entries that come back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods.prune.unstructured.movement import movement
from jaxlm.methods.prune.unstructured.patterns import keep_largest
from jaxlm.methods.prune.unstructured.scored import Scored


def test_the_gradient_of_a_score_is_that_of_the_masked_weight_times_the_weight(run):
    """By finite differences of the loss in W′, the matrix that the forward pass sees, at masked entries, too."""
    followed = run.follow(movement(sparsity=0.5, learning_rate=0.25, begin=1, end=1), 3)
    before, after = followed.states[1], followed.states[2]
    leaf = run.leaf(before)
    x, target = (np.asarray(jax.random.normal(jax.random.key(s), (2, 5, 8)), np.float64) for s in (1, 2))
    seen = np.asarray(leaf.materialize(), np.float64)
    assert (seen == 0).sum() == 64

    def loss(w):
        return ((np.einsum("lbi,lio->lbo", x, w) - target) ** 2).sum()

    slopes = np.zeros_like(seen)
    for index in np.ndindex(seen.shape):
        step = np.zeros_like(seen)
        step[index] = 1e-4
        slopes[index] = (loss(seen + step) - loss(seen - step)) / 2e-4
    moved = (np.asarray(leaf.scores, np.float64) - np.asarray(run.leaf(after).scores)) / 0.25
    assert np.allclose(moved, slopes * np.asarray(leaf.base), rtol=1e-3, atol=1e-3)
    assert np.abs(moved[seen == 0]).min() > 0, "masked entries are scored, too"


def test_the_largest_scores_are_kept_and_entries_come_back(run):
    followed = run.follow(movement(sparsity=0.6, begin=1, end=31, every=2), 31)
    masks = [np.asarray(run.leaf(state).mask) for state in followed.states]
    last = run.leaf(followed.states[-1])
    for layer in range(2):
        assert np.array_equal(last.mask[layer], keep_largest(last.scores[layer], 0.6))
    back = [(~before & after) for before, after in itertools.pairwise(masks)]
    assert any(b.any() for b in back)
    number = next(i for i, b in enumerate(back) if b.any())
    entry = np.argwhere(back[number])[0]
    value = lambda i: np.asarray(run.leaf(followed.states[i]).base)[tuple(entry)]  # noqa: E731
    assert value(number + 1) == value(number) != 0, "with the value that it had"


def test_a_prior_is_magnitude(run):
    followed = run.follow(movement(sparsity=0.5, learning_rate=1e-6, prior=1.0, begin=1, end=1), 1)
    last = run.leaf(followed.states[-1])
    assert isinstance(last, Scored)
    for layer in range(2):
        assert np.array_equal(last.mask[layer], keep_largest(jnp.abs(last.base[layer]), 0.5))


def test_rates_that_cannot_be():
    with pytest.raises(ValueError, match="must be positive"):
        movement(sparsity=0.5, end=3, learning_rate=0.0)
