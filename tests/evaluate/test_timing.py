import time

import jax
import jax.numpy as jnp
import pytest

from jaxlm.evaluate.timing import LEAST_ROUNDS, Timing, interleaved, machine, ratio, versions


def test_functions_take_turns_after_one_uncounted_call_each():
    calls = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert "".join(calls) == "abc" * 5
    assert [len(t.seconds) for t in timings.values()] == [4, 4, 4]


def test_no_round_starts_after_the_time_is_spent_but_the_first_ones_are_always_done():
    timings = interleaved({"slow": lambda: time.sleep(0.01)}, rounds=100, seconds=0.0)
    assert len(timings["slow"].seconds) == LEAST_ROUNDS


def test_the_result_is_waited_for():
    waited = []

    class Lazy:
        def block_until_ready(self):
            waited.append(True)
            return self

    interleaved({"lazy": lambda: {"out": [Lazy()]}}, rounds=3)
    assert len(waited) == 4


def test_compilation_is_not_measured():
    f = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + jnp.tanh(x).sum())
    x = jnp.ones((8, 8))
    started = time.perf_counter()
    timing = interleaved({"f": lambda: f(x)}, rounds=5)["f"]
    assert timing.median < (time.perf_counter() - started) / 5


def test_paired_ratios_cancel_what_slows_a_whole_round():
    load = (1.0, 5.0, 2.0, 1.0, 9.0)
    a, b = Timing(tuple(3 * x for x in load)), Timing(tuple(2 * x for x in load))
    assert ratio(a, b) == pytest.approx((1.5, 1.5, 1.5))
    assert a.iqr == pytest.approx(3 * (5 - 1))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="one call of interleaved"):
        ratio(Timing((1.0, 2.0)), Timing((1.0,)))
    with pytest.raises(ValueError, match="at least one round"):
        Timing(())
    with pytest.raises(ValueError, match="quartiles"):
        interleaved({"a": lambda: None}, rounds=1)
    with pytest.raises(ValueError, match="at least one function"):
        interleaved({})


def test_machine_and_versions_say_what_ran():
    assert machine()["cores"] >= 1 and jax.default_backend() in machine()["devices"]
    assert versions()["jax"] == jax.__version__
