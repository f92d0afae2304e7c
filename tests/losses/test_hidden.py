"""Hidden states by hand, and layer maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses.hidden import hidden_distance
from jaxlm.methods.distill.layer_map import layer_map


def test_hidden_distance_by_hand():
    teacher, student = jnp.zeros((1, 3, 2)), jnp.array([[[1.0, 3.0], [2.0, 0.0], [9.0, 9.0]]])
    term = hidden_distance(teacher, student, jnp.array([[True, True, False]]))
    assert (float(term.sum), float(term.weight)) == (5.0 + 2.0, 2.0)
    weighted = hidden_distance(teacher, student, jnp.array([[True, True, False]]), jnp.array([0.5]))
    assert (float(weighted.sum), float(weighted.weight)) == (3.5, 1.0)


def test_the_teacher_is_not_differentiated_and_padding_is_not_looked_at():
    h, valid = jnp.ones((2, 3, 4)), jnp.arange(3) < jnp.array([[3], [1]])
    assert not np.asarray(jax.grad(lambda t: hidden_distance(t, h, valid).sum)(2 * h)).any()
    f = lambda t, s: hidden_distance(t, s, valid).sum  # noqa: E731
    expected = jax.value_and_grad(f, 1)(2 * h, h)
    corrupted = jnp.where(valid[..., None], h, jnp.nan)
    value, gradient = jax.value_and_grad(f, 1)(2 * corrupted, corrupted)
    assert value == expected[0] and np.array_equal(gradient, expected[1])


def test_layer_maps():
    assert layer_map(3, 3, "uniform") == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert layer_map(4, 12, "uniform") == ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
    assert layer_map(2, 12, "last") == ((1, 11), (2, 12))
    assert layer_map(2, 12, "final") == ((2, 12),)
    assert layer_map(2, 4, [[0, 0], [2, 3], [2, 4]]) == ((0, 0), (2, 3), (2, 4))
    for student in range(1, 7):
        for teacher in range(student, 13):
            pairs = dict(layer_map(student, teacher, "uniform"))
            assert pairs[0] == 0 and pairs[student] == teacher
            assert all(pairs[i] < pairs[i + 1] for i in range(student)), "no teacher layer is taught twice"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("first", "unknown layer map 'first'"),
        (((0, 5),), r"\(0, 5\) does not exist"),
        (((3, 1),), r"\(3, 1\) does not"),
        (((1, 1), (1, 1)), "names a pair twice"),
        ((), "is empty"),
        ("last", r"\(1, -1\) does not exist"),
    ],
)
def test_wrong_layer_maps_say_so(kind, message):
    sizes = (4, 2) if kind == "last" else (2, 4)
    with pytest.raises(ValueError, match=message):
        layer_map(*sizes, kind)
