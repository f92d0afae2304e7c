"""The training step, compiled once for every shape of batch, while training goes on."""

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import jax

Shape = tuple[tuple[str, tuple[int, ...]], ...]


def shape_of(batch: Mapping[str, Any]) -> Shape:
    """What distinguishes one compiled step from another."""
    return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))


class Compiled:
    """Executables by shape of batch, compiled by a thread, that which is asked for before all others.

    A run with many shapes so waits for those of its next steps, not for all, and none is compiled twice. An error of
    the compiler comes up where its shape is asked for, or in `check`. Settings of jax that hold for one thread only
    (`with jax.default_matmul_precision(…)`) do not reach the compiling one: set them globally.

    Args:
      lower: `(batch) -> jax.stages.Lowered`, given shapes.
      batches: `{name: ShapeDtypeStruct}` of every batch that will come.
    """

    def __init__(self, lower: Callable[[Mapping[str, Any]], Any], batches: Sequence[Mapping[str, Any]]):
        self._lower = lower
        self._batches = {shape_of(batch): batch for batch in batches}
        self._thread = ThreadPoolExecutor(1, "compile")
        self._missing = list(self._batches)
        self._lock = Lock()
        self._futures: dict[Shape, Future] = {shape: Future() for shape in self._batches}

    def of(self, batch: Mapping[str, Any]) -> Callable:
        """The executable for this batch, once it is there. Raises KeyError for a shape that was not announced."""
        shape = shape_of(batch)
        future = self._futures[shape]
        with self._lock:
            begun = len(self._missing) < len(self._batches)
            if shape in self._missing:
                self._missing = [shape, *(other for other in self._missing if other != shape)]
        for _ in () if begun else self._batches:
            self._thread.submit(self._compile)
        return future.result()

    def ready(self, batch: Mapping[str, Any]) -> bool:
        """Whether `of` would not wait."""
        return self._futures[shape_of(batch)].done()

    def check(self) -> None:
        """Raises the error of any compilation that failed so far, before hours of training reach its shape."""
        for future in self._futures.values():
            if future.done():
                future.result()

    def _compile(self) -> None:
        """Compiles the first shape that is missing."""
        with self._lock:
            shape = self._missing.pop(0)
        try:
            self._futures[shape].set_result(self._lower(self._batches[shape]).compile())
        except BaseException as error:
            self._futures[shape].set_exception(error)
        _return_memory()

    def close(self) -> None:
        """Gives up what has not begun, and waits for the one that has: nothing compiles beside what comes next."""
        self._thread.shutdown(cancel_futures=True)
        for future in self._futures.values():
            future.cancel()


def _return_memory() -> None:
    """Gives the system what the compiler is done with, half a gigabyte, which GNU's C library may keep for ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def compiled(
    step: Callable, shardings: Any, state: Any, constants: Any, batches: Sequence[Mapping[str, Any]]
) -> Compiled:
    """`step(state, constants, batch) -> (state, log)`, the state donated, its shardings those given.

    What is called is the jitted function, which finds its executable in jax's cache: by itself an executable of jax
    0.10 refuses arrays of four bits, which it takes to be laid out otherwise than it lays them out.
    """
    thread = threading.local()

    def announced(*args: Any) -> Any:
        if not getattr(thread, "lowers", False):
            raise TypeError("the step was compiled for a state and batches of other shapes or dtypes than it is given")
        return step(*args)

    jitted = jax.jit(announced, donate_argnums=0, out_shardings=(shardings, None))
    # Shapes, since the arrays of the state are gone once the first step has begun.
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)

    def lower(batch: Mapping[str, Any]) -> Lowered:
        thread.lowers = True
        return Lowered(jitted, jitted.lower(state, constants, batch))

    return Compiled(lower, batches)


class Lowered(NamedTuple):
    """A jitted function lowered for one shape of batch; `compile` gives the function, ready for that shape."""

    jitted: Callable
    lowered: jax.stages.Lowered

    def compile(self) -> Callable:
        self.lowered.compile()
        return self.jitted
