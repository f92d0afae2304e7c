"""Batches made ahead of the steps that use them."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any


class prefetch:
    """Iterates over ``batches(start) .. batches(stop - 1)``, made ahead of time by one thread.

    Args:
      batches: step -> batch.
      depth: largest number of batches that wait in the queue.
      transform: applied to every batch in the thread, for example to put it on devices.

    Attributes:
      waited: seconds that the consumer has spent waiting for batches: the cost of the data pipeline.

    An error in the thread is raised instead of the batch. The thread ends when the iterator is exhausted, closed (it is
    a context manager too) or garbage-collected.
    """

    def __init__(
        self,
        batches: Callable[[int], Any],
        start: int,
        stop: int,
        depth: int = 2,
        transform: Callable[[Any], Any] = lambda batch: batch,
    ):
        self.waited = 0.0
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        # The thread refers to the queue and the event but not to self, so that it ends with the iterator.
        self._finalizer = weakref.finalize(self, self._stopped.set)
        arguments = (batches, start, stop, transform, self._ready, self._stopped)
        self._thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._stopped.is_set():
            raise StopIteration
        begin = time.perf_counter()
        batch, error, done = self._ready.get()
        self.waited += time.perf_counter() - begin
        if error is not None:
            self.close()
            raise error
        if done:
            self.close()
            raise StopIteration
        return batch

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> "prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(batches, start: int, stop: int, transform, ready: queue.Queue, stopped: threading.Event) -> None:
    def put(item: tuple) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.05)
            except queue.Full:
                continue

    try:
        for step in range(start, stop):
            put((transform(batches(step)), None, False))
            if stopped.is_set():
                return
        put((None, None, True))
    except BaseException as error:  # handed to the consumer, who raises it
        put((None, error, False))
