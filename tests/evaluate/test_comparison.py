import dataclasses
import math

import numpy as np
import pytest

from jaxlm.evaluate.comparison import ModelResult, against_reference, by_name, compare, dominates
from jaxlm.evaluate.per_example import PerExampleResults
from jaxlm.evaluate.timing import Timing


def test_a_paired_difference_is_far_more_certain_than_either_value(make):
    a, b = make.row("a", 1, 1.0, 1.60), make.row("b", 1, 1.0, 1.62)
    change = compare(b, a).quality
    assert change.value == pytest.approx(b.quality.value - a.quality.value)
    assert change.error < a.quality.error / 10
    assert compare(b, a).outcomes()["quality"] == -1 and compare(a, b).outcomes()["quality"] == 1


def test_speed_is_compared_per_token_and_round_by_round():
    load = np.array([1.0, 4.0, 2.0])
    fields = {"description": "", "parameters": 1, "parameters_non_embedding": 1, "bytes_on_disk": 1}
    a = ModelResult("a", batch=Timing(tuple(load)), batch_tokens=100, **fields)
    b = ModelResult("b", batch=Timing(tuple(load)), batch_tokens=200, **fields)
    assert compare(b, a).speed == pytest.approx((2.0, 2.0, 2.0))
    assert b.tokens_per_second == pytest.approx((100.0, 200 / 3, 200 / 1.5))


def test_outcomes_are_won_only_beyond_noise(make):
    slow = make.row("slow", 10, 0.40, 1.6)
    outcomes = compare(make.row("twin", 10, 0.401, 1.6), slow).outcomes()
    assert outcomes["size"] == outcomes["speed"] == outcomes["latency"] == 0
    assert compare(make.row("fast", 10, 0.30, 1.6), slow).outcomes()["speed"] == 1
    assert compare(slow, make.row("fast", 10, 0.30, 1.6)).outcomes()["speed"] == -1


def test_what_is_not_a_number_loses_and_what_is_not_measured_is_none(make):
    good, broken, counted = make.row("g", 1, 1.0, 1.6), make.row("b", 1, 1.0, math.nan), make.row("c", 1)
    assert compare(broken, good).outcomes()["quality"] == -1
    assert compare(good, broken).outcomes()["quality"] == 1
    assert compare(counted, good).outcomes() == {"size": 0, "speed": None, "latency": None, "quality": None}
    assert broken.quality.error is None


def test_dominance_needs_every_axis(rows, make):
    named = by_name(rows)
    assert dominates(named["student"], named["control"])
    assert not dominates(named["int8"], named["prune"]), "smaller, but slower"
    assert not any(dominates(row, row) for row in rows)
    assert not dominates(make.row("counted", 1), named["teacher"])


def test_rows_must_fit_together(rows, make):
    with pytest.raises(KeyError, match="teacher"):
        by_name([dataclasses.replace(rows[1], reference="teachr", beside=()), rows[0]])
    with pytest.raises(ValueError, match="unique"):
        by_name([rows[0], rows[0]])
    with pytest.raises(ValueError, match="itself"):
        by_name([dataclasses.replace(rows[0], reference="teacher")])
    with pytest.raises(ValueError, match="at least one row"):
        by_name([])
    with pytest.raises(ValueError, match="belong together"):
        dataclasses.replace(rows[0], batch_tokens=None)
    with pytest.raises(ValueError, match="at least one byte"):
        make.row("empty", 0)
    other = PerExampleResults("causal", {"nats": (1.0,), "tokens": (1,), "bytes": (1,)})
    with pytest.raises(ValueError, match="'student' and 'teacher' were measured on different held-out data"):
        compare(rows[1], dataclasses.replace(rows[0], held_out=other))
    assert against_reference(rows[0], by_name(rows)) is None
