"""Prefetching keeps order and depth, hands errors over, measures waiting, and its thread always ends."""

import gc
import threading
import time

import numpy as np
import pytest

from jaxlm.data import prefetch


def wait_for(condition, seconds=5.0):
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.01)
    return condition()


def threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_order_and_place():
    placed_in = set()

    def to_device(batch):
        placed_in.add(threading.current_thread().name)
        return {k: v + 1 for k, v in batch.items()}

    iterator = prefetch(lambda step: {"x": np.array(step)}, 3, 9, transform=to_device)
    assert [int(b["x"]) for b in iterator] == [4, 5, 6, 7, 8, 9]
    assert placed_in == {"prefetch"} and not threads()
    assert list(iterator) == [] and list(prefetch(lambda s: s, 5, 5)) == []


def test_never_more_than_depth_ahead():
    made = []
    with prefetch(lambda step: made.append(step) or step, 0, 100, depth=2) as iterator:
        assert next(iterator) == 0
        assert wait_for(lambda: len(made) == 4)  # one taken, two ready, one in hand
        time.sleep(0.1)
        assert len(made) == 4
    assert not threads()


def test_errors_arrive_where_the_batch_would_have_been():
    def batches(step):
        if step == 2:
            raise ValueError("row 7 of shard 3")
        return step

    iterator = prefetch(batches, 0, 5)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(ValueError, match="row 7 of shard 3"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    assert not threads()


def test_thread_ends_with_the_consumer():
    def consume():
        for step in prefetch(lambda step: step, 0, 10**9):
            if step == 3:
                break

    consume()
    gc.collect()
    assert wait_for(lambda: not threads())
    with pytest.raises(RuntimeError, match="consumer"), prefetch(lambda step: step, 0, 10**9) as iterator:
        next(iterator)
        raise RuntimeError("consumer")
    assert not threads()


def test_waiting_is_measured():
    with prefetch(lambda step: time.sleep(0.05), 0, 4) as slow:
        list(slow)
    assert slow.waited > 0.1
    with prefetch(lambda step: step, 0, 4, depth=4) as fast:
        time.sleep(0.3)
        list(fast)
    assert fast.waited < 0.1
