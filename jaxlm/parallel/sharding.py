"""From axis names to shardings: the rules, and what they say of one array, a tree, a batch and an activation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.core import Axes, Tree, arrays, describe, nearest, with_arrays
from jaxlm.core.context import unsharded

MeshAxes = str | tuple[str, ...] | None
Sizes = Mapping[str, tuple[tuple[int, ...], ...]]
"""Sizes of the factors of every dimension by canonical path, as `core.axis_sizes` gives them."""

PARAMETER_RULES: dict[str, MeshAxes] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "embed": "fsdp",
}
"""Where parameters go: Megatron's split over `tensor`, ZeRO's over `fsdp`. Names without a rule are replicated.

On TPUs keep `hidden / fsdp` at 128 or more and give further chips to `data`: of thinner shares the compiler assembles a
layer's weights by adding zero-padded copies, an all-reduce with twice the traffic of a gather."""

ACTIVATION_RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "activation": None,
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
}
"""Where activations go. `activation` is the residual stream's width, apart from the `embed` of parameters."""

Rules = Mapping[str, MeshAxes]


def make_rules(overrides: Mapping[str, Any], axes: Mapping[str, Axes], mesh: Mesh) -> dict[str, MeshAxes]:
    """The default rules with a user's own: `{axis name: mesh axis, several of them, or None (replicate)}`.

    Args:
      overrides: by axis name; each replaces the default.
      axes: axis names by path of the parameters.
      mesh: the mesh that the rules speak of.

    Raises:
      ValueError: for an axis name that no parameter and no activation has, or a mesh axis that does not exist.
    """
    named = {name for dims in axes.values() for axis in dims for name in _names(axis)}
    known = named | ACTIVATION_RULES.keys() | {"layers"}
    rules: dict[str, MeshAxes] = PARAMETER_RULES | ACTIVATION_RULES
    for name, where in overrides.items():
        if name not in known:
            raise ValueError(f"a sharding rule names the axis {name!r}, which nothing has; {nearest(name, known)}")
        target = (where,) if isinstance(where, str) else tuple(where or ())
        if len(set(target)) < len(target):
            raise ValueError(f"the sharding rule for {name!r} names a mesh axis twice: {', '.join(target)}")
        for axis in target:
            if axis not in mesh.shape:
                raise ValueError(
                    f"the sharding rule for {name!r} names the mesh axis {axis!r}, which does not exist; "
                    f"{nearest(str(axis), mesh.shape)}"
                )
        rules[name] = target or None
    return rules


def _names(axis: Any) -> tuple[str, ...]:
    """Names of a dimension: none, one, or those of a compound one."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(n for n in axis if n is not None)


class Fallback(NamedTuple):
    """Why a dimension is split less than its rule says."""

    name: str
    size: int
    wanted: tuple[str, ...]
    got: tuple[str, ...]
    reason: str


def _dimension(
    axis: Any, size: int, factors: tuple[int, ...] | None, rules: Rules, mesh: Mesh, taken: set[str]
) -> tuple[tuple[str, ...], Fallback | None]:
    """Mesh axes of one dimension.

    A compound dimension goes where the first of its names with a rule goes. Blocks of that factor are contiguous only
    together with the slower ones, so their product must divide (with the mapped name first: the number of heads).
    """
    names = _names(axis)
    mapped = next((name for name in names if rules.get(name)), None)
    if mapped is None:
        return (), None
    rule = rules[mapped]
    wanted = (rule,) if isinstance(rule, str) else tuple(rule or ())
    free = tuple(a for a in wanted if a not in taken)
    unit = size
    if factors is not None and len(names) == len(factors):
        unit = math.prod(factors[: names.index(mapped) + 1])
    got = free if size else ()
    while got and unit % math.prod(mesh.shape[a] for a in got):
        got = got[:-1]
    got = tuple(a for a in got if mesh.shape[a] > 1)
    if got == tuple(a for a in wanted if mesh.shape[a] > 1):
        return got, None
    reason = "another dimension of the array has it" if free != wanted else f"{unit} does not divide"
    return got, Fallback(mapped, unit, wanted, got, reason)


def _spec(
    axes: Axes, shape: tuple[int, ...], rules: Rules, mesh: Mesh, factors: Mapping[Any, tuple[int, ...]]
) -> tuple[PartitionSpec, list[Fallback]]:
    if len(axes) != len(shape):
        raise ValueError(f"an array of shape {shape} has {len(axes)} axis names {axes}; every dimension needs one")
    taken: set[str] = set()
    entries: list[Any] = []
    fallbacks = []
    for axis, size in zip(axes, shape, strict=True):
        own = factors.get(axis)
        own = own if own is not None and math.prod(own) == size else None
        got, fallback = _dimension(axis, size, own, rules, mesh, taken)
        taken |= set(got)
        entries.append(None if not got else got[0] if len(got) == 1 else got)
        fallbacks += [] if fallback is None else [fallback]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries), fallbacks


def spec_of(
    axes: Axes,
    shape: tuple[int, ...],
    rules: Rules,
    mesh: Mesh,
    factors: Mapping[Any, tuple[int, ...]] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of one array.

    A name without a rule is replicated. A dimension that its mesh axes do not divide uses as many of them, from the
    first, as do. Two dimensions that want the same mesh axis: the first one gets it.

    Args:
      axes: name, `None` or tuple of names for each dimension.
      shape: sizes of the dimensions.
      rules: mesh axes by axis name.
      mesh: the mesh.
      factors: sizes of the factors of compound dimensions, by their names: `{("kv_heads", "head_dim"): (4, 64)}`. A
        compound dimension is then cut between heads, never inside one; without, its product decides.

    Raises:
      ValueError: when there are more or fewer names than dimensions.
    """
    return _spec(axes, shape, rules, mesh, factors or {})[0]


def shardings(
    params: Tree, axes: Mapping[str, Axes], mesh: Mesh, rules: Rules, sizes: Sizes | None = None
) -> dict[str, NamedSharding]:
    """`{array name: NamedSharding}` for every array of a tree, those inside Weights included, in either view.

    What could not be split as the rules say is logged once, one line for each cause.

    Args:
      params: arrays or ShapeDtypeStructs.
      axes: axis names by canonical path.
      mesh, rules: see `make_rules`.
      sizes: factor sizes by canonical path; arrays it does not list are judged by the product of theirs.

    Raises:
      KeyError: for a parameter without axis names.
      ValueError: for an array with more or fewer names than dimensions.
    """
    specs, fallbacks = _tree_specs(params, axes, mesh, rules, sizes)
    for line in _lines(fallbacks, mesh):
        logging.info("sharding: %s", line)
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def notices(params: Tree, axes: Mapping[str, Axes], mesh: Mesh, rules: Rules, sizes: Sizes | None = None) -> list[str]:
    """What `shardings` could not split as the rules say, one line for each cause."""
    return _lines(_tree_specs(params, axes, mesh, rules, sizes)[1], mesh)


def _tree_specs(
    params: Tree, axes: Mapping[str, Axes], mesh: Mesh, rules: Rules, sizes: Sizes | None
) -> tuple[dict[str, PartitionSpec], dict[Fallback, list[str]]]:
    specs: dict[str, PartitionSpec] = {}
    fallbacks: dict[Fallback, list[str]] = {}
    values = arrays(params)
    for name, info in describe(params, axes).items():
        own = sizes.get(info.path) if sizes else None
        factors = dict(zip(axes[info.path], own, strict=True)) if own else {}
        try:
            specs[name], found = _spec(info.axes or (), values[name].shape, rules, mesh, factors)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for fallback in found:
            fallbacks.setdefault(fallback, []).append(name)
    return specs, fallbacks


def _lines(fallbacks: Mapping[Fallback, list[str]], mesh: Mesh) -> list[str]:
    lines = []
    for (name, _, wanted, got, reason), where in fallbacks.items():
        over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in wanted)
        done = f"split over {', '.join(got)} only" if got else "replicated"
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        lines.append(f"{name} over {over}: {reason}; {done} in {where[0]}{more}")
    return lines


@dataclass(frozen=True)
class Place:
    """`(activation, axis names) -> activation`, constrained to the mesh; equal meshes and rules compile once."""

    mesh: Mesh
    rules: tuple[tuple[str, MeshAxes], ...]

    def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        spec, fallbacks = _spec(names, x.shape, dict(self.rules), self.mesh, {})
        # Where a rule cannot be kept, the partitioner is free to do better than replicate.
        unkept = {fallback.name for fallback in fallbacks if not fallback.got}
        entries = [*spec, *(None,) * (x.ndim - len(spec))]
        entries = [PartitionSpec.UNCONSTRAINED if n in unkept else e for n, e in zip(names, entries, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*entries)))


def place(mesh: Mesh, rules: Rules) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """What `Context.place` should be: pins activations by the names of their dimensions.

    `None` among the names means replicated. On one device nothing is pinned.
    """
    return unsharded if mesh.size == 1 else Place(mesh, tuple(rules.items()))


def shard_tree(params: Tree, where: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """The tree with every array on its devices; a ShapeDtypeStruct is told its sharding instead.

    Raises:
      KeyError: for an array that has no sharding.
    """
    values = arrays(params)
    missing = values.keys() - where.keys()
    if missing:
        raise KeyError(f"no sharding for {sorted(missing)[:5]}; compute shardings from this tree")
    return with_arrays(params, {name: _put(value, where[name]) for name, value in values.items()})


def _put(value: Any, sharding: NamedSharding) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    return jax.device_put(value, sharding)


def ways(name: str, mesh: Mesh, rules: Rules) -> int:
    """In how many parts the rules cut an axis name: what a padded vocabulary must be a multiple of."""
    where = rules.get(name) or ()
    return math.prod(mesh.shape[axis] for axis in ((where,) if isinstance(where, str) else where))


def shard_batch(batch: Mapping[str, Any], mesh: Mesh, rules: Rules) -> dict[str, jax.Array]:
    """Every array of a batch with its rows on the mesh; each process gives the rows of its own devices.

    Raises:
      ValueError: when the rows do not divide over the parts of the batch on this process's devices.
    """
    rows = NamedSharding(mesh, spec_of(("batch",), (ways("batch", mesh, rules),), rules, mesh))
    numbers = rows.addressable_devices_indices_map((ways("batch", mesh, rules),)).values()
    parts = len({index[0].start for index in numbers if index})

    def put(name: str, value: Any) -> jax.Array:
        if value.shape[0] % parts:
            raise ValueError(
                f"{name}: {value.shape[0]} rows do not divide over the {parts} parts of the batch on this process; "
                f"use a batch size that is a multiple of {parts}, or pad the last batch"
            )
        return jax.make_array_from_process_local_data(rows, value)

    return {name: put(name, value) for name, value in batch.items()}
