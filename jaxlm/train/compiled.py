"""The training step, compiled once for every shape of batch, while training goes on."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

Shape = tuple[tuple[str, tuple[int, ...]], ...]


def shape_of(batch: Mapping[str, Any]) -> Shape:
    """What distinguishes one compiled step from another."""
    return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))


class Compiled:
    """Executables by shape of batch. The first that is asked for is compiled first, the others behind it in a thread.

    A run with many shapes so waits for one of them, not for all; an executable cannot recompile, so none is compiled
    twice. An error of the compiler comes up where its shape is asked for, or in `check`. Settings of jax that hold for
    one thread only (`with jax.default_matmul_precision(…)`) do not reach the compiling one: set them globally.

    Args:
      lower: `(batch) -> jax.stages.Lowered`, given shapes.
      batches: `{name: ShapeDtypeStruct}` of every batch that will come.
    """

    def __init__(self, lower: Callable[[Mapping[str, Any]], Any], batches: Sequence[Mapping[str, Any]]):
        self._lower = lower
        self._batches = {shape_of(batch): batch for batch in batches}
        self._thread = ThreadPoolExecutor(1, "compile")
        self._found: dict[Shape, Future] = {}

    def of(self, batch: Mapping[str, Any]) -> Callable:
        """The executable for this batch, once it is there. Raises KeyError for a shape that was not announced."""
        shape = shape_of(batch)
        if not self._found:
            order = sorted(self._batches, key=lambda other: other != shape)
            self._found = {s: self._thread.submit(self._compile, self._batches[s]) for s in order}
        return self._found[shape].result()

    def ready(self, batch: Mapping[str, Any]) -> bool:
        """Whether `of` would not wait."""
        found = self._found.get(shape_of(batch))
        return found is not None and found.done()

    def check(self) -> None:
        """Raises the error of any compilation that failed so far, before hours of training reach its shape."""
        for found in self._found.values():
            if found.done():
                found.result()

    def _compile(self, batch: Mapping[str, Any]) -> Callable:
        return self._lower(batch).compile()

    def close(self) -> None:
        """Gives up what has not begun, and waits for the one that has: nothing compiles beside what comes next."""
        self._thread.shutdown(cancel_futures=True)


def compiled(
    step: Callable, shardings: Any, state: Any, constants: Any, batches: Sequence[Mapping[str, Any]]
) -> Compiled:
    """`step(state, constants, batch) -> (state, log)`, the state donated, its shardings those given."""
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    # Shapes, since the arrays of the state are gone once the first step has begun.
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    return Compiled(lambda batch: jitted.lower(state, constants, batch), batches)
