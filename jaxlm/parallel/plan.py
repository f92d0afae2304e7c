"""Ahead-of-time planning: compile a step for a TPU slice without a TPU, and read its memory and communication.

The compiler is the one that runs on the machines (libtpu), so "it compiles and fits" is a fact and not an estimate.
It needs a separate environment (`make plan-env`), started with `JAX_PLATFORMS=cpu`.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.core import is_stacked, lookup
from jaxlm.parallel.hlo import Collective, Result, collectives, traffic
from jaxlm.parallel.mesh import make_mesh

GB = 10**9
CHIP_MEMORY = {"v4": 32 * GB, "v5e": 16 * GB, "v5p": 95 * GB, "v6e": 32 * GB}
"""Bytes of HBM a chip, as published: https://cloud.google.com/tpu/docs/v4 (and /v5e, /v5p, /v6e), "HBM capacity"."""


class Memory(NamedTuple):
    """Bytes that a compiled program needs on one chip.

    Attributes:
      arguments: parameters, optimizer state, batch.
      outputs: the results.
      aliased: the part of the outputs that reuses donated arguments.
      temporary: activations, gathered weights, gradients, which exist only inside the program.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int

    @property
    def peak(self) -> int:
        """Largest number of bytes in use at once: `arguments + (outputs - aliased) + temporary + code`."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def memory(compiled: jax.stages.Compiled) -> Memory:
    """The compiler's analysis of a program's memory, per chip."""
    stats: Any = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


class Stack(NamedTuple):
    """A stacked argument of a program: its dtype, its whole shape, and the shape of one chip's shard."""

    dtype: Any
    whole: tuple[int, ...]
    share: tuple[int, ...]


class Gathered(NamedTuple):
    """A collective whose result holds all layers of a stacked argument, and more of it than the chip's shard."""

    argument: str
    result: Result
    collective: Collective


def gathered_parameters(operations: Iterable[Collective], stacks: Mapping[str, Stack]) -> list[Gathered]:
    """Stacked arrays that a collective gathers for all layers at once, although one layer at a time would do.

    A result counts when it is of the same kind (float or integer) and has the shape of the stack with one or more of
    the split dimensions whole, in any order of the dimensions. An activation of exactly that shape counts too; the
    collective's `source` tells them apart. An empty list means that only the layer in use is ever gathered.
    """
    shapes: dict[tuple[bool, tuple[int, ...]], str] = {}
    for name, stack in stacks.items():
        for sizes in itertools.product(*({w, s} for w, s in zip(stack.whole[1:], stack.share[1:], strict=True))):
            shapes.setdefault((_is_float(stack.dtype), _sorted((stack.whole[0], *sizes))), name)
    for stack in stacks.values():  # a shard is not gathered, even if another stack has its shape
        shapes.pop((_is_float(stack.dtype), _sorted(stack.share)), None)
    return [
        Gathered(shapes[key], result, collective)
        for collective in operations
        for result in collective.results
        if (key := ("f" in result.dtype, _sorted(result.shape))) in shapes
    ]


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _sorted(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def stacked_arguments(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> dict[str, Stack]:
    """The arguments of a program that hold several layers (`layers_0-11/...` in their name), parameters and optimizer
    state alike, with the shard of one chip."""
    infos = jax.tree.leaves_with_path(lowered.args_info)
    shardings = jax.tree.leaves(compiled.input_shardings)
    stacks = {}
    for (path, info), sharding in zip(infos, shardings, strict=True):
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path[1:])
        if is_stacked(name):
            stacks[name] = Stack(info.dtype, info.shape, sharding.shard_shape(info.shape))
    return stacks


class Plan(NamedTuple):
    """Memory and communication of a step on a TPU slice.

    Attributes:
      topology: generation and shape of the slice, `v5e:4x4`.
      mesh: size of each mesh axis.
      seconds: compilation time.
      memory: bytes needed per chip; limit: bytes of HBM per chip.
      collectives: all communication between chips.
      gathered: stacks that are gathered whole; there should be none.
    """

    topology: str
    mesh: dict[str, int]
    seconds: float
    memory: Memory
    limit: int
    collectives: list[Collective]
    gathered: list[Gathered]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit

    def __str__(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        m = self.memory
        lines = [
            f"{self.topology} ({axes}), compiled in {self.seconds:.0f} s",
            f"memory a chip: {m.peak / GB:.2f} of {self.limit / GB:.0f} GB {'fits' if self.fits else 'DOES NOT FIT'} "
            f"(arguments {m.arguments / GB:.2f}, new outputs {(m.outputs - m.aliased) / GB:.2f}, "
            f"temporary {m.temporary / GB:.2f}, code {m.code / GB:.2f})",
        ]
        for kind, total in traffic(self.collectives).items():
            lines.append(
                f"{kind:<18} {total.operations:>4} in the program ({total.in_loops} in loops), "
                f"{total.times:>6} a step, {total.bytes / GB:>7.2f} GB a chip and step"
            )
        for whole in self.gathered:
            lines.append(
                f"WHOLE STACK {whole.argument}: {whole.collective.kind} of {whole.result.dtype}"
                f"{list(whole.result.shape)} in {whole.collective.source}"
            )
        return "\n".join(lines)


def plan(lower: Callable[[Mesh], jax.stages.Lowered], topology: str, shape: Mapping[str, int]) -> Plan:
    """Compiles a step for a TPU slice.

    Args:
      lower: from the mesh to `jax.jit(step).lower(...)` on ShapeDtypeStructs that carry shardings on that mesh
        (`shard_tree` gives them).
      topology: generation and shape of the slice: `v5e:4x4`, `v5p:4x4x8`, `v6e:4x4`.
      shape: of the mesh, as in `make_mesh`.

    Raises:
      ValueError: for an unknown generation, or a mesh that does not fit the slice.
      RuntimeError: when the TPU compiler is not installed, or the program does not fit in a chip's memory.
    """
    limit = lookup(CHIP_MEMORY, topology.partition(":")[0], "TPU generation")
    mesh = make_mesh(shape, topology_devices(topology))
    lowered = lower(mesh)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RuntimeError(
            f"the step does not fit {topology}: {error}\nUse remat='full', a smaller batch, or more chips on fsdp"
        ) from error
    seconds = time.perf_counter() - start
    operations = collectives(compiled.as_text() or "")
    gathered = gathered_parameters(operations, stacked_arguments(lowered, compiled))
    return Plan(topology, dict(mesh.shape), seconds, memory(compiled), limit, operations, gathered)


def topology_devices(topology: str) -> list[Any]:
    """Devices of a TPU slice that need not exist: programs can be compiled for them, not run on them."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise RuntimeError(
            f"the TPU compiler does not start for {topology!r}: {error}\nIt needs a slice like v5e:4x4, the "
            "environment of `make plan-env`, JAX_PLATFORMS=cpu, and no other program using libtpu"
        ) from error
