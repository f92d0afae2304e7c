"""Answers of a teacher against hand-computed cases, finite differences, and what wrong versions get caught by."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses.cross_entropy import cross_entropy
from jaxlm.losses.divergence import DIVERGENCES, divergence_of
from jaxlm.losses.soft_targets import mean_logits, mixture_logits, response, top_answers, top_response

pytestmark = pytest.mark.slow

ALL = jnp.array([True, True])
every = pytest.mark.parametrize("name", DIVERGENCES)


def log_softmax(x):
    return [v - math.log(sum(math.exp(u) for u in x)) for v in x]


def by_hand(name, teacher, student, temperature):
    """Plain Python over one position."""
    t = log_softmax([v / temperature for v in teacher])
    s = log_softmax([v / temperature for v in student])
    kl = lambda p, q: sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))  # noqa: E731
    if name == "jsd":
        m = [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in zip(t, s, strict=True)]
        return temperature**2 * (kl(t, m) + kl(s, m)) / 2
    return temperature**2 * (kl(t, s) if name == "forward" else kl(s, t))


def test_two_tokens_by_hand():
    """Teacher 3:1, student 1:1, T = 1: KL = 3/4 ln 3/2 + 1/4 ln 1/2; with T = 2 the teacher is √3:1, times 4."""
    teacher, student = jnp.array([[math.log(3.0), 0.0]]), jnp.zeros((1, 2))
    one = response(teacher, student, jnp.array([True]), temperature=1.0)
    assert np.isclose(one.sum, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), atol=1e-6) and one.weight == 1
    p = math.sqrt(3) / (1 + math.sqrt(3))
    two = response(teacher, student, jnp.array([True]), temperature=2.0)
    assert np.isclose(two.sum, 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), atol=1e-6)


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_every_divergence_by_hand(name, temperature):
    teacher, student = [[0.3, -1.2, 2.0], [1.0, 0.0, -1.0]], [[1.1, 0.2, -0.7], [0.5, 0.5, 3.0]]
    term = response(jnp.array(teacher), jnp.array(student), ALL, temperature, DIVERGENCES[name])
    expected = sum(by_hand(name, t, s, temperature) for t, s in zip(teacher, student, strict=True))
    assert np.isclose(term.sum, expected, rtol=1e-4) and term.weight == 2


def test_the_directions_are_not_mixed_up():
    """The student covers what the teacher excludes: finite forwards, enormous backwards."""
    teacher, student = jnp.array([[0.0, -50.0]]), jnp.zeros((1, 2))
    both = {n: float(response(teacher, student, jnp.array([True]), 1.0, DIVERGENCES[n]).sum) for n in DIVERGENCES}
    assert np.isclose(both["forward"], math.log(2), atol=1e-5)
    assert np.isclose(both["reverse"], 25 - math.log(2), atol=1e-4)


@every
def test_gradient_against_finite_differences(name):
    rng = np.random.default_rng(0)
    teacher, student = (rng.normal(size=(3, 5)) for _ in range(2))
    f = lambda s: response(jnp.array(teacher), s, jnp.array([True, False, True]), 3.0, DIVERGENCES[name]).sum  # noqa: E731
    gradient = np.asarray(jax.grad(f)(jnp.array(student, jnp.float32)))
    kept = [0, 2]
    for i in range(3):
        for j in range(5):
            values = []
            for step in (1e-5, -1e-5):
                moved = student.copy()
                moved[i, j] += step
                values.append(sum(by_hand(name, teacher[k], moved[k], 3.0) for k in kept))
            assert np.isclose(gradient[i, j], (values[0] - values[1]) / 2e-5, atol=1e-5)


def test_equals_cross_entropy_for_a_certain_teacher():
    """One-hot teacher, T = 1: value and gradient are those of the cross-entropy."""
    labels = jnp.array([2, 0, -100])
    student = jax.random.normal(jax.random.key(0), (3, 4))
    teacher = jnp.where(jax.nn.one_hot(labels, 4) > 0, 0.0, -jnp.inf)
    value, gradient = jax.value_and_grad(lambda s: response(teacher, s, labels >= 0, temperature=1.0).sum)(student)
    expected = jax.value_and_grad(lambda s: cross_entropy(s, labels).sum)(student)
    assert np.isclose(value, expected[0], rtol=1e-6) and np.allclose(gradient, expected[1], atol=1e-6)


@every
def test_temperature_keeps_the_size_of_the_gradient(name):
    """With T² the gradient tends to a limit; without, it would be 16 times smaller at T = 40 than at T = 10."""
    teacher, student = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[0.0, 0.5, 0.0]])
    size = lambda t: float(  # noqa: E731
        jnp.linalg.norm(jax.grad(lambda s: response(teacher, s, jnp.array([True]), t, DIVERGENCES[name]).sum)(student))
    )
    assert 0.9 < size(40.0) / size(10.0) < 1.1


@every
def test_nothing_to_learn_from_oneself(name):
    logits = 5 * jax.random.normal(jax.random.key(0), (2, 7))
    f = lambda s: response(logits, s, ALL, 2.0, DIVERGENCES[name]).sum  # noqa: E731
    assert abs(float(f(logits))) < 1e-5 and np.abs(jax.grad(f)(logits)).max() < 1e-5


def test_jensen_shannon_is_symmetric_and_bounded():
    t, s = (20 * jax.random.normal(jax.random.key(i), (50, 6)) for i in (0, 1))
    t, s = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
    one, two = DIVERGENCES["jsd"](t, s), DIVERGENCES["jsd"](s, t)
    assert np.allclose(one, two, atol=1e-6) and (one >= -1e-6).all() and (one <= math.log(2) + 1e-6).all()
    assert one.max() > 0.6
    left, right = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0]])
    apart = response(left, right, jnp.array([True]), 1.0, DIVERGENCES["jsd"])
    assert np.isclose(apart.sum, math.log(2), atol=1e-6)


def with_gradient(name, teacher, student, temperature):
    """The term of one position, and its gradient in the student's logits."""
    teacher, one, measure = jnp.array([teacher]), jnp.array([True]), DIVERGENCES[name]
    return jax.value_and_grad(lambda s: response(teacher, s, one, temperature, measure).sum)(jnp.array([student]))


@every
def test_impossible_tokens_give_no_nan(name):
    """-inf on either side, as masked vocabularies have it, and where both agree that a token is impossible."""
    lowest = jnp.finfo(jnp.float32).min
    for teacher, student in (
        ([0.0, 1.0, -jnp.inf], [0.3, 0.2, -jnp.inf]),
        ([0.0, 1.0, lowest], [0.3, 0.2, lowest]),
        ([0.0, 1.0, -jnp.inf], [0.3, 0.2, lowest]),
    ):
        for temperature in (0.5, 1.0, 4.0):
            value, gradient = with_gradient(name, teacher, student, temperature)
            expected = by_hand(name, teacher[:2], student[:2], temperature)
            assert np.isclose(value, expected, rtol=1e-4) and np.isfinite(gradient).all()
    if name != "reverse":  # there the student must not hold what the teacher excludes
        value, gradient = with_gradient(name, [0.0, 1.0, -jnp.inf], [0.3, 0.2, 0.1], 2.0)
        assert np.isfinite(value) and np.isfinite(gradient).all() and np.asarray(gradient)[0, 2] > 0


@every
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
def test_padding_is_masked(name, bad):
    """Values and gradients do not depend on what stands at padding, whatever it is."""
    teacher, student = (jax.random.normal(jax.random.key(i), (2, 5)) for i in (0, 1))
    valid = jnp.array([True, False])
    f = lambda t, s: response(t, s, valid, 2.0, DIVERGENCES[name]).sum  # noqa: E731
    expected = jax.value_and_grad(f, 1)(teacher, student)
    value, gradient = jax.value_and_grad(f, 1)(teacher.at[1].set(bad), student.at[1].set(bad))
    assert value == expected[0] and np.array_equal(gradient, expected[1]) and not np.asarray(gradient)[1].any()
    assert response(teacher, student, valid).weight == 1


def test_the_teacher_is_not_differentiated():
    t, s = (jax.random.normal(jax.random.key(i), (2, 5)) for i in (0, 1))
    assert not np.asarray(jax.grad(lambda t: response(t, s, ALL).sum)(t)).any()


# The whole family between the directions ------------------------------------------------------------------------------


def test_jensen_shannon_with_a_beta_by_hand_and_at_its_ends():
    """β KL(t‖m) + (1 - β) KL(s‖m), m = β t + (1 - β) s; divided by β or 1 - β it ends in the two directions."""
    t, s, beta = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6]), 0.25
    m = beta * t + (1 - beta) * s
    expected = beta * (t * np.log(t / m)).sum() + (1 - beta) * (s * np.log(s / m)).sum()
    log = lambda p: jnp.log(jnp.array(p))  # noqa: E731
    assert np.isclose(divergence_of("jsd", beta)(log(t), log(s)), expected, rtol=1e-5)
    assert np.isclose(divergence_of("jsd", 1e-4)(log(t), log(s)) / 1e-4, (t * np.log(t / s)).sum(), rtol=1e-2)
    assert np.isclose(divergence_of("jsd", 1 - 1e-4)(log(t), log(s)) / 1e-4, (s * np.log(s / t)).sum(), rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "beta", "message"),
    [("jsd", 0.0, "beta must lie between"), ("jsd", 1.0, "forward and reverse"), ("forward", 0.5, "leave beta out")],
)
def test_a_beta_that_means_nothing_is_refused(name, beta, message):
    with pytest.raises(ValueError, match=message):
        divergence_of(name, beta)


def test_samples_and_positions_are_weighted():
    """Twice the weight is the sample twice; weight 0, or NaN where nothing is valid, is no sample."""
    t, s = (jax.random.normal(jax.random.key(i), (3, 2, 5)) for i in (0, 1))
    valid = jnp.array([[True, True], [True, False], [False, False]])
    one = [response(t[i], s[i], valid[i]) for i in range(3)]
    term = response(t, s, valid, weights=jnp.array([2.0, 0.5, jnp.nan]))
    assert np.isclose(term.sum, 2 * one[0].sum + 0.5 * one[1].sum) and term.weight == 2 * 2 + 0.5
    by_position = response(t, s, valid, weights=jnp.array([[2.0, 0.0], [1.0, jnp.nan], [jnp.nan, jnp.nan]]))
    expected = 2 * response(t[0, :1], s[0, :1], valid[0, :1]).sum + one[1].sum
    assert np.isclose(by_position.sum, expected) and by_position.weight == 3
    with pytest.raises(ValueError, match=r"weights \(3, 2\) for values \(3,\)"):
        response(t[:, 0], s[:, 0], valid[:, 0], weights=jnp.ones((3, 2)))


# Several teachers -----------------------------------------------------------------------------------------------------


def test_means_of_teachers():
    """Probabilities by mixture, logits by geometric mean; a teacher of weight 1 is the only one."""
    a, b = (3 * jax.random.normal(jax.random.key(i), (4, 6)) for i in (0, 1))
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)  # noqa: E731
    mixture = softmax(mixture_logits([a, b], (0.3, 0.7), 2.0) / 2)
    assert np.allclose(mixture, 0.3 * softmax(a / 2) + 0.7 * softmax(b / 2), atol=1e-6)
    assert np.allclose(mean_logits([a, b], (0.3, 0.7)), 0.3 * a + 0.7 * b, atol=1e-6)
    assert np.allclose(softmax(mixture_logits([a, b], (1.0, 0.0), 2.0) / 2), softmax(a / 2), atol=1e-6)
    excluded, uniform = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.zeros((1, 3))
    assert np.isfinite(mixture_logits([excluded, uniform], (0.5, 0.5), 2.0)).all()
    assert mean_logits([excluded, uniform], (0.5, 0.5))[0, 1] < -1e29


def test_the_mixture_has_the_gradient_of_the_mean_of_forward_divergences():
    a, b, s = (jax.random.normal(jax.random.key(i), (2, 6)) for i in (0, 1, 2))
    mixed = jax.grad(lambda s: response(mixture_logits([a, b], (0.3, 0.7), 2.0), s, ALL).sum)(s)
    mean = jax.grad(lambda s: 0.3 * response(a, s, ALL).sum + 0.7 * response(b, s, ALL).sum)(s)
    assert np.allclose(mixed, mean, atol=1e-5)


# The top k and the rest -----------------------------------------------------------------------------------------------

TEMPERATURES = (1.0, 2.0)


def buckets(logits, ids, temperature):
    """Probabilities of the tokens `ids` and of all others, in plain numpy."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    return np.append(p[ids], 1 - p[ids].sum())


@every
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_by_hand(name, temperature):
    """Every divergence of k + 1 probabilities, in plain numpy."""
    t, s = (np.asarray(2 * jax.random.normal(jax.random.key(i), (2, 7))) for i in (0, 1))
    answers = top_answers(jnp.array(t), 3, TEMPERATURES)
    assert np.array_equal(answers["ids"], np.argsort(-t, axis=-1)[:, :3])
    assert np.allclose(answers["logsumexp"][:, 1], np.log(np.exp(t / 2).sum(-1)), atol=1e-6)
    term = top_response(answers, jnp.array(s), ALL, TEMPERATURES, temperature, DIVERGENCES[name])
    expected = 0.0
    for i in range(2):
        ids = np.argsort(-t[i])[:3]
        p, q = buckets(t[i], ids, temperature), buckets(s[i], ids, temperature)
        m = (p + q) / 2
        kl = lambda a, b: (a * np.log(a / b)).sum()  # noqa: E731
        halves = (kl(p, m) + kl(q, m)) / 2
        expected += {"forward": kl(p, q), "reverse": kl(q, p), "jsd": halves}[name] * temperature**2
    assert np.isclose(term.sum, expected, rtol=1e-4) and term.weight == 2


@every
def test_top_k_of_all_is_the_teacher(name):
    """k = vocabulary: value and gradient of `response`, also where a mesh padded the student's vocabulary."""
    t, s = (2 * jax.random.normal(jax.random.key(i), (2, 7)) for i in (0, 1))
    answers = top_answers(t, 7, TEMPERATURES)
    f = lambda s: top_response(answers, s, ALL, TEMPERATURES, 2.0, DIVERGENCES[name]).sum  # noqa: E731
    value, gradient = jax.value_and_grad(f)(s)
    expected = jax.value_and_grad(lambda s: response(t, s, ALL, 2.0, DIVERGENCES[name]).sum)(s)
    assert np.isclose(value, expected[0], rtol=1e-5) and np.allclose(gradient, expected[1], atol=1e-5)


def test_the_rest_is_penalised():
    """Mass on tokens that the cache does not name costs: renormalising over k would not see it."""
    t = jnp.array([[3.0, 2.0, -4.0, -4.0]])
    answers = top_answers(t, 2, TEMPERATURES)
    f = lambda s: top_response(answers, s, jnp.array([True]), TEMPERATURES, 1.0).sum  # noqa: E731
    off_cache = jnp.array([[3.0, 2.0, 8.0, -4.0]])
    assert f(off_cache) > 1 > 1e-3 > abs(f(t))
    gradient = np.asarray(jax.grad(f)(off_cache))
    assert gradient[0, 2] > 0.5 and abs(gradient.sum()) < 1e-6


@every
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_top_k_ignores_what_is_ignored(name, bad):
    t, s = (jax.random.normal(jax.random.key(i), (2, 5)) for i in (0, 1))
    answers = top_answers(t, 2, TEMPERATURES)
    valid = jnp.array([True, False])
    f = lambda a, s: top_response(a, s, valid, TEMPERATURES, 2.0, DIVERGENCES[name]).sum  # noqa: E731
    expected = jax.value_and_grad(f, 1)(answers, s)
    corrupted = {n: a.at[1].set(99 if n == "ids" else bad) for n, a in answers.items()}
    value, gradient = jax.value_and_grad(f, 1)(corrupted, s.at[1].set(bad))
    assert value == expected[0] and np.array_equal(gradient, expected[1])


def test_top_k_against_finite_differences():
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(1, 6)), rng.normal(size=(1, 6))
    answers, ids = top_answers(jnp.array(t), 2, TEMPERATURES), np.argsort(-t[0])[:2]
    f = lambda s: top_response(answers, s, jnp.array([True]), TEMPERATURES, 2.0).sum  # noqa: E731
    gradient = np.asarray(jax.grad(f)(jnp.array(s, jnp.float32)))[0]
    p = buckets(t[0], ids, 2.0)
    for j in range(6):
        values = []
        for step in (1e-5, -1e-5):
            moved = s[0].copy()
            moved[j] += step
            values.append(4 * (p * np.log(p / buckets(moved, ids, 2.0))).sum())
        assert np.isclose(gradient[j], (values[0] - values[1]) / 2e-5, atol=1e-5)
