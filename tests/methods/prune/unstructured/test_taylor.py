"""Gradient times weight: the score is the first-order change of the loss, smoothed over steps."""

import numpy as np
import pytest

from jaxlm.methods.prune.unstructured.patterns import keep_largest
from jaxlm.methods.prune.unstructured.taylor import taylor


def test_the_score_is_a_running_mean_of_weight_times_gradient(run):
    followed = run.follow(taylor(sparsity=0.5, smoothing=0.75, begin=6, end=6), 6)
    score = np.zeros((2, 8, 8))
    for number, state in enumerate(followed.states[1:], start=1):
        before = followed.states[number - 1]
        change = np.abs(np.asarray(run.leaf(before).base) * np.asarray(followed.grads(before)))
        score = 0.75 * score + 0.25 * change
        assert np.allclose(run.leaf(state).scores, score, rtol=1e-4, atol=1e-6)
    last = run.leaf(followed.states[-1])
    for layer in range(2):
        assert np.array_equal(last.mask[layer], keep_largest(last.scores[layer], 0.5))


def test_smoothing_is_a_share():
    with pytest.raises(ValueError, match=r"taylor: smoothing must be in \[0, 1\)"):
        taylor(sparsity=0.5, end=3, smoothing=1.0)
