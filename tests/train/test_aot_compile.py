"""Steps by shape of batch: each compiled once, the one asked for first, errors where they are met."""

import threading
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from jaxlm.train.aot_compile import Compiled, compiled, shape_of


def batch(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"x": jax.ShapeDtypeStruct((2, length), jnp.float32)}


class Lowered:
    def __init__(self, given, done, gate=None):
        self.given, self.done, self.gate = given, done, gate

    def compile(self):
        if self.gate is not None:
            assert self.gate.wait(10)
        self.done.append(shape_of(self.given))
        return lambda: self.given


def test_what_is_asked_for_comes_before_what_was_announced():
    """The thread is held in the shape that nobody asks for until another one has gone ahead of the rest."""
    done: list = []
    held, gate = threading.Event(), threading.Event()

    def lower(b):
        if b["x"].shape[1] > 1:
            return Lowered(b, done)
        held.set()
        return Lowered(b, done, gate)

    with closing(Compiled(lower, [batch(n) for n in (1, 2, 3, 4)])) as steps:
        assert steps.of(batch(2))() == batch(2)
        assert held.wait(10)

        def open_when_asked():
            while steps._missing[:1] != [shape_of(batch(4))]:
                time.sleep(0.001)
            gate.set()

        watcher = threading.Thread(target=open_when_asked)
        watcher.start()
        for length in (4, 3, 1, 2, 4):
            assert steps.of(batch(length))() == batch(length)
        watcher.join()
    assert done == [shape_of(batch(n)) for n in (2, 1, 4, 3)]


def test_nothing_waits_for_the_others():
    done: list = []
    gate = threading.Event()
    lower = lambda b: Lowered(b, done, gate if b["x"].shape[1] > 1 else None)  # noqa: E731
    with closing(Compiled(lower, [batch(1), batch(2)])) as steps:
        assert not steps.ready(batch(1))
        assert steps.of(batch(1))() == batch(1) and len(done) == 1
        assert steps.ready(batch(1)) and not steps.ready(batch(2))
        steps.check()
        gate.set()
        assert steps.of(batch(2))() == batch(2)


def test_an_error_of_the_compiler_comes_up_where_its_shape_is_asked_for():
    def lower(b):
        if b["x"].shape[1] == 2:
            raise ValueError("out of memory")
        return Lowered(b, [])

    with closing(Compiled(lower, [batch(1), batch(2)])) as steps:
        steps.of(batch(1))
        with pytest.raises(ValueError, match="out of memory"):
            steps.of(batch(2))
        with pytest.raises(ValueError, match="out of memory"):
            steps.check()
        with pytest.raises(KeyError):
            steps.of(batch(3))


def test_the_state_is_given_away_and_keeps_its_placement():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.device_put(jnp.zeros(3), where)
    step = lambda state, scale, batch: (state + scale * batch["x"].sum(), batch["x"].max())  # noqa: E731
    with closing(compiled(step, where, state, jnp.float32(2), [batch(1), batch(4)])) as steps:
        for length in (1, 4):
            data = {"x": jnp.ones((2, length))}
            before, (state, log) = state, steps.of(data)(state, jnp.float32(2), data)
            assert before.is_deleted() and log == 1
    assert state.tolist() == [20.0] * 3 and state.sharding == where
