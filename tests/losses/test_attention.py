"""Attention and relations: by hand, 0 for oneself, blind to padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses.attention import attention_distance
from jaxlm.losses.relations import relation_distance, relation_heads

pytestmark = pytest.mark.slow

LOWEST = jnp.finfo(jnp.float32).min
TOKENS = jnp.arange(4) < jnp.array([[4], [2]])
SEGMENTS = TOKENS.astype(jnp.int32)
CAUSAL = jnp.tril(jnp.ones((4, 4), bool))
both = pytest.mark.parametrize("on", ["probabilities", "scores"])


def scores(seed, heads):
    """Of two rows, the second of two tokens, as a causal model gives them."""
    seen = TOKENS[:, None, :] & TOKENS[:, :, None] & CAUSAL
    return jnp.where(seen[:, None], jax.random.normal(jax.random.key(seed), (2, heads, 4, 4)), LOWEST)


def states(seed, heads, width):
    return jax.random.normal(jax.random.key(seed), (2, 4, heads, width))


def test_attention_by_hand():
    """Two tokens, no mask; teacher 3:1 and 1:1, student 1:1: KL and mean square of the first query only."""
    teacher = jnp.array([[[[math.log(3.0), 0.0], [0.0, 0.0]]]])
    student, tokens = jnp.zeros((1, 1, 2, 2)), jnp.array([[True, True]])
    kl = attention_distance(teacher, student, tokens)
    assert np.isclose(kl.sum, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), atol=1e-6) and kl.weight == 2
    square = attention_distance(teacher, student, tokens, "scores")
    assert np.isclose(square.sum, math.log(3.0) ** 2 / 2) and square.weight == 2


@both
def test_nothing_to_learn_from_oneself(on):
    teacher = scores(0, 3)
    f = lambda s: attention_distance(teacher, s, TOKENS, on).sum  # noqa: E731
    assert abs(f(teacher)) < 1e-6 and np.abs(jax.grad(f)(teacher)).max() < 1e-6
    assert attention_distance(teacher, teacher, TOKENS, on).weight == 6


@both
@pytest.mark.parametrize("heads", ["match", "mean"])
def test_rows_and_columns_of_padding_count_nothing(on, heads):
    """Not their values, NaN too, nor their number: longer rows have the same term and the same gradient."""
    t, s = scores(0, 3), scores(1, 3)
    f = lambda t, s, tokens: attention_distance(t, s, tokens, on, heads)  # noqa: E731
    expected, gradient = f(t, s, TOKENS), jax.grad(lambda s: f(t, s, TOKENS).sum)(s)
    real = (TOKENS[:, None, :] & TOKENS[:, :, None])[:, None]
    corrupted = [jnp.where(real, x, jnp.nan) for x in (t, s)]
    assert f(*corrupted, TOKENS) == expected
    assert np.array_equal(jax.grad(lambda s: f(corrupted[0], s, TOKENS).sum)(corrupted[1]), gradient)
    longer = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 3)), constant_values=7.0)  # noqa: E731
    padded = f(longer(t), longer(s), jnp.pad(TOKENS, ((0, 0), (0, 3))))
    assert np.isclose(padded.sum, expected.sum, rtol=1e-6) and padded.weight == expected.weight


@both
def test_heads_one_to_one_averaged_or_paired(on):
    """Unequal numbers are averaged; pairs pick; a permutation of heads changes the match and not the mean."""
    t, s = scores(0, 4), scores(1, 2)
    mean = attention_distance(t, s, TOKENS, on, "mean")
    assert attention_distance(t, s, TOKENS, on) == mean
    assert np.isclose(attention_distance(t[:, ::-1], s, TOKENS, on).sum, mean.sum, rtol=1e-5)
    paired = attention_distance(t, s, TOKENS, on, ((0, 3), (1, 1)))
    assert np.isclose(paired.sum, attention_distance(t[:, jnp.array([3, 1])], s, TOKENS, on).sum, rtol=1e-6)
    assert not np.isclose(paired.sum, mean.sum)
    with pytest.raises(ValueError, match=r"head pair \(2, 0\) does not exist: 0..1 and 0..3 do"):
        attention_distance(t, s, TOKENS, on, ((2, 0),))


def test_averaged_probabilities_by_hand():
    t, s = scores(0, 3), scores(1, 2)
    p, q = (np.asarray(jax.nn.softmax(x)).mean(1) for x in (t, s))
    valid = np.asarray(TOKENS)
    divergence = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)
    assert np.isclose(attention_distance(t, s, TOKENS).sum, divergence[valid].sum(), rtol=1e-5)


def test_the_student_learns_and_the_teacher_does_not():
    t, s = scores(0, 2), scores(1, 2)
    f = lambda t, s: attention_distance(t, s, TOKENS).sum  # noqa: E731
    assert not np.asarray(jax.grad(f)(t, s)).any() and np.asarray(jax.grad(f, 1)(t, s)).any()


# Relations -----------------------------------------------------------------------------------------------------------


def test_relations_by_hand():
    """One row of two tokens, one relation head: softmax(A Aᵀ / √2) in plain numpy."""
    t, s = (np.array([[[[1.0, 0.0]], [[0.5, 2.0]]]]), np.array([[[[0.0, 1.0]], [[1.0, 1.0]]]]))
    relation = []
    for x in (t, s):
        products = x[0, :, 0] @ x[0, :, 0].T / math.sqrt(2)
        relation.append(np.exp(products) / np.exp(products).sum(-1, keepdims=True))
    expected = (relation[0] * np.log(relation[0] / relation[1])).sum()
    term = relation_distance(jnp.array(t), jnp.array(s), jnp.ones((1, 2), jnp.int32), 1)
    assert np.isclose(term.sum, expected, rtol=1e-5) and term.weight == 2


def test_relations_split_the_heads_anew():
    """Twelve dimensions in 3 heads of 4 or 2 of 6 are 6 relation heads of 2 either way."""
    x = states(0, 3, 4)
    again = x.reshape(2, 4, 2, 6)
    assert abs(relation_distance(x, again, SEGMENTS, 6).sum) < 1e-6
    wide = relation_distance(states(1, 4, 6), x, SEGMENTS, 6)
    assert wide.sum > 0 and wide.weight == 6


def test_relations_of_oneself_are_learned():
    x = states(0, 2, 8)
    f = lambda s: relation_distance(x, s, SEGMENTS, 4).sum  # noqa: E731
    assert abs(f(x)) < 1e-6 and np.abs(jax.grad(f)(x)).max() < 1e-5


def test_relations_do_not_see_padding_or_another_segment():
    t, s = states(0, 2, 8), states(1, 2, 8)
    f = lambda t, s, segments: relation_distance(t, s, segments, 4)  # noqa: E731
    expected = f(t, s, SEGMENTS)
    corrupted = [jnp.where(TOKENS[..., None, None], x, jnp.nan) for x in (t, s)]
    assert f(*corrupted, SEGMENTS) == expected
    gradient = jax.grad(lambda s: f(corrupted[0], s, SEGMENTS).sum)(corrupted[1])
    assert np.array_equal(gradient, jax.grad(lambda s: f(t, s, SEGMENTS).sum)(s))
    longer = lambda x: jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=7.0)  # noqa: E731
    padded = f(longer(t), longer(s), jnp.pad(SEGMENTS, ((0, 0), (0, 3))))
    assert np.isclose(padded.sum, expected.sum, rtol=1e-6) and padded.weight == expected.weight
    packed = f(t[:1], s[:1], jnp.array([[1, 1, 2, 2]]))
    apart = [f(t[:1, part], s[:1, part], jnp.ones((1, 2), jnp.int32)).sum for part in (slice(0, 2), slice(2, 4))]
    assert np.isclose(packed.sum, sum(apart), rtol=1e-5)


def test_relation_heads():
    assert relation_heads([768, 384]) == 48 and relation_heads([1024, 384]) == 32 and relation_heads([16, 24]) == 2
    assert relation_heads([4, 4]) == 1 and relation_heads([768, 384], 12) == 12
    with pytest.raises(ValueError, match=r"5 relation heads do not divide .* widths 768, 384; take a divisor of 384"):
        relation_heads([768, 384], 5)
