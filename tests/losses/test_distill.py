"""Distillation against hand-computed cases, finite differences, and what wrong versions get caught by."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Loss, Tap, Term
from jaxlm.losses.cross_entropy import cross_entropy
from jaxlm.losses.distillation import DIVERGENCES, Teacher, distill, hidden_distance, layer_map, response
from jaxlm.models import model_config
from jaxlm.models.model import Model

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
    ours = jax.value_and_grad(lambda s: response(teacher, s, labels >= 0, temperature=1.0).sum)(student)
    theirs = jax.value_and_grad(lambda s: cross_entropy(s, labels).sum)(student)
    assert np.isclose(ours[0], theirs[0], rtol=1e-6) and np.allclose(ours[1], theirs[1], atol=1e-6)


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
    h = jnp.ones((2, 3, 4))
    assert not np.asarray(jax.grad(lambda t: hidden_distance(t, h, jnp.ones((2, 3), bool)).sum)(2 * h)).any()


def test_hidden_distance_by_hand():
    teacher, student = jnp.zeros((1, 3, 2)), jnp.array([[[1.0, 3.0], [2.0, 0.0], [9.0, 9.0]]])
    term = hidden_distance(teacher, student, jnp.array([[True, True, False]]))
    assert (float(term.sum), float(term.weight)) == (5.0 + 2.0, 2.0)


# Layer maps ----------------------------------------------------------------------------------------------------------


def test_layer_maps():
    assert layer_map(3, 3, "uniform") == {0: 0, 1: 1, 2: 2, 3: 3}
    assert layer_map(4, 12, "uniform") == {0: 0, 1: 3, 2: 6, 3: 9, 4: 12}
    assert layer_map(2, 12, "last") == {1: 11, 2: 12}
    assert layer_map(2, 4, ((0, 0), (2, 3))) == {0: 0, 2: 3}
    for student in range(1, 7):
        for teacher in range(student, 13):
            pairs = layer_map(student, teacher, "uniform")
            assert pairs[0] == 0 and pairs[student] == teacher
            assert all(pairs[i] < pairs[i + 1] for i in range(student)), "no teacher layer is taught twice"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("first", "unknown layer map 'first'"),
        (((0, 5),), r"\(0, 5\) does not exist"),
        (((3, 1),), r"\(3, 1\) does not"),
        ("last", r"\(1, -1\) does not exist"),
    ],
)
def test_wrong_layer_maps_say_so(kind, message):
    sizes = (4, 2) if kind == "last" else (2, 4)
    with pytest.raises(ValueError, match=message):
        layer_map(*sizes, kind)


# The method ----------------------------------------------------------------------------------------------------------


def student_of(**fields):
    return Model(
        model_config("gpt2", vocab_size=7, hidden_size=4, num_layers=2, num_heads=1, max_positions=8, **fields)
    )


def fixed_teacher(logits, hidden, width=4):
    """Gives what it is told, whatever the batch."""
    forward = lambda params, batch, taps: {"logits": logits, "taps": {tap: hidden + tap.depth for tap in taps}}  # noqa: E731
    return Teacher(forward, {}, 4, width)


def base_loss(logits, hidden, term):
    def fn(params, constants, batch, ctx):
        return {"cross_entropy": term}, {"logits": logits, "taps": {Tap("hidden", i): hidden for i in range(3)}}

    return Loss(fn)


def test_terms_and_coefficients():
    """(1 - α) on what was there, α on the answers, and the hidden coefficient shared by the pairs, on tokens only."""
    labels = jnp.array([[1, -100, 3]])
    t, s = (jax.random.normal(jax.random.key(i), (1, 3, 7)) for i in (0, 1))
    hidden = jnp.zeros((1, 3, 4))
    method = distill(fixed_teacher(t, hidden), alpha=0.3, temperature=4.0, hidden=6.0)
    method.init(jax.random.key(0), student_of(), {}, {})
    loss = method.loss(base_loss(s, hidden, Term(jnp.float32(5), jnp.float32(2), 2.0)))
    assert loss.taps == {Tap("hidden", i) for i in range(3)}
    batch = {"labels": labels, "attention_mask": jnp.array([[1, 1, 0]])}
    terms, _ = loss.fn({}, {"teacher": {}}, batch, Context())
    assert np.isclose(terms["cross_entropy"].coefficient, 0.7 * 2)
    assert terms["response"].coefficient == 0.3 and terms["response"].weight == 2
    assert np.isclose(terms["response"].sum, response(t, s, labels >= 0, 4.0).sum)
    # uniform pairs (0, 0), (1, 2), (2, 4): the fixed teacher's states are its depth, the student's zero
    assert [float(terms[f"hidden_{i}"].sum) for i in range(3)] == [0.0, 2 * 4.0, 2 * 16.0]
    assert {float(terms[f"hidden_{i}"].weight) for i in range(3)} == {2.0}
    assert {terms[f"hidden_{i}"].coefficient for i in range(3)} == {2.0}


def test_without_a_mask_every_token_counts_and_the_method_can_be_used_again():
    method = distill(fixed_teacher(jnp.zeros((1, 3, 7)), jnp.zeros((1, 3, 4))), hidden=1.0, layers=((2, 4),))
    for _ in range(2):
        method.init(jax.random.key(0), student_of(), {}, {})
    loss = method.loss(base_loss(jnp.zeros((1, 3, 7)), jnp.zeros((1, 3, 4)), Term(jnp.float32(0), jnp.float32(1))))
    terms, _ = loss.fn({}, {"teacher": {}}, {"labels": jnp.array([[1, 2, 3]])}, Context())
    assert terms.keys() == {"cross_entropy", "response", "hidden_2"} and terms["hidden_2"].weight == 3


def test_a_projection_where_widths_differ():
    hidden = jnp.ones((1, 3, 6))
    method = distill(fixed_teacher(jnp.zeros((1, 3, 7)), hidden, width=6), hidden=1.0, layers=((0, 0),))
    adapted = method.init(jax.random.key(0), student_of(), {"embed": {}}, {})
    kernel = adapted.params["distill"]["projection"]["kernel"]
    assert kernel.shape == (4, 6) and adapted.axes == {"distill/projection/kernel": ("embed", None)}
    own = jax.random.normal(jax.random.key(1), (1, 3, 4))
    loss = method.loss(base_loss(jnp.zeros((1, 3, 7)), own, Term(jnp.float32(0), jnp.float32(1))))
    terms, _ = loss.fn(adapted.params, {"teacher": {}}, {"labels": jnp.array([[1, 2, 3]])}, Context())
    assert np.isclose(terms["hidden_0"].sum, ((1 - own @ kernel) ** 2).mean(-1).sum(), rtol=1e-5)
    assert "distill/projection/kernel" not in method.bake(None, adapted.params, adapted.axes, {})[2]


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        ({"divergence": "forwards"}, {}, "did you mean 'forward'"),
        ({"temperature": 0.0}, {}, "temperature must be positive"),
        ({}, {"head": "sequence", "regression": True}, "regression has one output"),
    ],
)
def test_what_cannot_be_distilled_is_refused(arguments, fields, message):
    with pytest.raises(ValueError, match=message):
        distill(fixed_teacher(0, 0), **arguments).init(jax.random.key(0), student_of(**fields), {}, {})


def test_hidden_states_of_an_encoder_decoder_are_refused():
    model = Model(model_config("t5", vocab_size=7, hidden_size=8, num_layers=1))
    with pytest.raises(ValueError, match="encoder-decoder"):
        distill(fixed_teacher(0, 0), hidden=1.0).init(jax.random.key(0), model, {}, {})
    distill(fixed_teacher(0, 0)).init(jax.random.key(0), model, {}, {})
