"""From axis names to shardings: the rules, and the shardings of an array, a tree and an activation."""

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
"""Sizes of the factors of every dimension by canonical path, see `core.axis_sizes`."""

PARAMETER_RULES: dict[str, MeshAxes] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "embed": "fsdp",
}
"""Mesh axes of parameters: Megatron's split over `tensor`, ZeRO's over `fsdp`. Names without a rule are replicated.

On TPUs keep `hidden / fsdp` at 128 or more and give further chips to `data`: from narrower shards the compiler
assembles a layer's weights by adding zero-padded copies, an all-reduce with twice the traffic of an all-gather."""

ACTIVATION_RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "activation": None,
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
}
"""Mesh axes of activations. `activation` is the width of the residual stream, which parameters call `embed`."""

Rules = Mapping[str, MeshAxes]


def make_rules(overrides: Mapping[str, Any], axes: Mapping[str, Axes], mesh: Mesh) -> dict[str, MeshAxes]:
    """The default rules as far as the mesh has their axes, overridden: `{axis name: mesh axes}`.

    Args:
      overrides: `{axis name: a mesh axis, a tuple of mesh axes, or None (replicate)}`; each replaces the default.
      axes: axis names by path of the parameters.
      mesh: the mesh whose axes the rules name.

    Raises:
      ValueError: for an axis name that no parameter and no activation has, a mesh axis that does not exist, or one of
        several devices that no rule names: they would all compute the same.
    """
    parameter_names = {name for dims in axes.values() for axis in dims for name in _names(axis)}
    valid = parameter_names | ACTIVATION_RULES.keys() | {"layers"}
    defaults = {name: _as_tuple(mesh_axes) for name, mesh_axes in (PARAMETER_RULES | ACTIVATION_RULES).items()}
    rules: dict[str, MeshAxes] = {
        name: tuple(axis for axis in mesh_axes if axis in mesh.shape) or None for name, mesh_axes in defaults.items()
    }
    for name, override in overrides.items():
        if name not in valid:
            raise ValueError(f"a sharding rule names the axis {name!r}, which nothing has; {nearest(name, valid)}")
        mesh_axes = _as_tuple(override)
        if len(set(mesh_axes)) < len(mesh_axes):
            raise ValueError(f"the sharding rule for {name!r} names a mesh axis twice: {', '.join(mesh_axes)}")
        for axis in mesh_axes:
            if axis not in mesh.shape:
                raise ValueError(
                    f"the sharding rule for {name!r} names the mesh axis {axis!r}, which does not exist; "
                    f"{nearest(str(axis), mesh.shape)}"
                )
        rules[name] = mesh_axes or None
    named = {axis for mesh_axes in rules.values() for axis in _as_tuple(mesh_axes)}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in named:
            known = named.union(*defaults.values())
            raise ValueError(
                f"the mesh axis {axis!r} has {size} devices and no sharding rule names it, so that they would compute "
                f"the same; map an axis name to it in config.sharding, or name another ({nearest(axis, known)})"
            )
    return rules


def _as_tuple(mesh_axes: Any) -> tuple[str, ...]:
    """The mesh axes of a rule: none, one, or several."""
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())


def _names(axis: Any) -> tuple[str, ...]:
    """Names of a dimension: none, one, or those of a compound one."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(n for n in axis if n is not None)


class Fallback(NamedTuple):
    """A dimension that is split over fewer mesh axes than its rule says, and why."""

    name: str
    size: int
    requested: tuple[str, ...]
    assigned: tuple[str, ...]
    reason: str


def _dimension(
    axis: Any, size: int, factors: tuple[int, ...] | None, rules: Rules, mesh: Mesh, taken: set[str]
) -> tuple[tuple[str, ...], Fallback | None]:
    """Mesh axes of one dimension, without those in `taken`.

    A compound dimension is split by the first of its names that has a rule. Blocks of that factor are contiguous only
    together with the slower ones, so the product of these sizes must divide (of heads, their number).
    """
    names = _names(axis)
    mapped = next((name for name in names if rules.get(name)), None)
    if mapped is None:
        return (), None
    requested = _as_tuple(rules[mapped])
    free = tuple(a for a in requested if a not in taken)
    unit = size
    if factors is not None and len(names) == len(factors):
        unit = math.prod(factors[: names.index(mapped) + 1])
    assigned = free if size else ()
    while assigned and unit % math.prod(mesh.shape[a] for a in assigned):
        assigned = assigned[:-1]
    assigned = tuple(a for a in assigned if mesh.shape[a] > 1)
    if assigned == tuple(a for a in requested if mesh.shape[a] > 1):
        return assigned, None
    reason = "another dimension of the array has it" if free != requested else f"{unit} does not divide"
    return assigned, Fallback(mapped, unit, requested, assigned, reason)


def _spec(
    axes: Axes, shape: tuple[int, ...], rules: Rules, mesh: Mesh, factors: Mapping[Any, tuple[int, ...]]
) -> tuple[PartitionSpec, list[Fallback]]:
    if len(axes) != len(shape):
        raise ValueError(f"an array of shape {shape} has {len(axes)} axis names {axes}; every dimension needs one")
    taken: set[str] = set()
    entries: list[Any] = []
    fallbacks = []
    for axis, size in zip(axes, shape, strict=True):
        sizes = factors.get(axis)
        sizes = sizes if sizes is not None and math.prod(sizes) == size else None
        assigned, fallback = _dimension(axis, size, sizes, rules, mesh, taken)
        taken |= set(assigned)
        entries.append(None if not assigned else assigned[0] if len(assigned) == 1 else assigned)
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

    A name without a rule is replicated. A dimension that is not divisible by its mesh axes drops the last of them
    until it is. Of two dimensions with the same mesh axis the first is split over it.

    Args:
      axes: name, `None` or tuple of names of every dimension.
      shape: sizes of the dimensions.
      rules: mesh axes by axis name.
      mesh: the mesh.
      factors: sizes of the factors of compound dimensions, by their names: `{("kv_heads", "head_dim"): (4, 64)}`. A
        compound dimension is then split between heads, never inside one; without them only its size must divide.

    Raises:
      ValueError: when there are more or fewer names than dimensions.
    """
    return _spec(axes, shape, rules, mesh, factors or {})[0]


def shardings(
    params: Tree, axes: Mapping[str, Axes], mesh: Mesh, rules: Rules, sizes: Sizes | None = None
) -> dict[str, NamedSharding]:
    """`{array name: NamedSharding}` for every array of a tree, those inside Weights included, in either view.

    Dimensions that could not be split as the rules say are logged, one line per cause.

    Args:
      params: arrays or ShapeDtypeStructs.
      axes: axis names by canonical path.
      mesh, rules: see `make_rules`.
      sizes: factor sizes by canonical path, see `factors` in `spec_of`.

    Raises:
      KeyError: for a parameter without axis names.
      ValueError: for an array with more or fewer names than dimensions.
    """
    specs, fallbacks = _tree_specs(params, axes, mesh, rules, sizes)
    for line in _lines(fallbacks, mesh):
        logging.info("sharding: %s", line)
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _tree_specs(
    params: Tree, axes: Mapping[str, Axes], mesh: Mesh, rules: Rules, sizes: Sizes | None
) -> tuple[dict[str, PartitionSpec], dict[Fallback, list[str]]]:
    specs: dict[str, PartitionSpec] = {}
    fallbacks: dict[Fallback, list[str]] = {}
    values = arrays(params)
    for name, info in describe(params, axes).items():
        factor_sizes = sizes.get(info.path) if sizes else None
        factors = dict(zip(axes[info.path], factor_sizes, strict=True)) if factor_sizes else {}
        try:
            specs[name], array_fallbacks = _spec(info.axes or (), values[name].shape, rules, mesh, factors)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for fallback in array_fallbacks:
            fallbacks.setdefault(fallback, []).append(name)
    return specs, fallbacks


def _lines(fallbacks: Mapping[Fallback, list[str]], mesh: Mesh) -> list[str]:
    lines = []
    for (name, _, requested, assigned, reason), paths in fallbacks.items():
        over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in requested)
        result = f"split over {', '.join(assigned)} only" if assigned else "replicated"
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"{name} over {over}: {reason}; {result} in {paths[0]}{more}")
    return lines


@dataclass(frozen=True)
class LogicalConstraint:
    """`(activation, axis names) -> activation` with its sharding constrained; equal meshes and rules compile once."""

    mesh: Mesh
    rules: tuple[tuple[str, MeshAxes], ...]

    def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        spec, fallbacks = _spec(names, x.shape, dict(self.rules), self.mesh, {})
        # Where a rule cannot be followed, the partitioner may do better than replicate.
        free = {fallback.name for fallback in fallbacks if not fallback.assigned}
        entries = [*spec, *(None,) * (x.ndim - len(spec))]
        entries = [PartitionSpec.UNCONSTRAINED if n in free else e for n, e in zip(names, entries, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*entries)))


def place(mesh: Mesh, rules: Rules) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The `Context.place` of a mesh: constrains the sharding of activations by the names of their dimensions.

    `None` among the names means replicated. On one device nothing is constrained.
    """
    return unsharded if mesh.size == 1 else LogicalConstraint(mesh, tuple(rules.items()))


def shard_tree(params: Tree, array_shardings: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """The tree with every array on its devices, or every ShapeDtypeStruct with its sharding.

    Raises:
      KeyError: for an array that has no sharding.
    """
    values = arrays(params)
    missing = values.keys() - array_shardings.keys()
    if missing:
        raise KeyError(f"no sharding for {sorted(missing)[:5]}; compute shardings from this tree")
    return with_arrays(params, {name: _put(value, array_shardings[name]) for name, value in values.items()})


def _put(value: Any, sharding: NamedSharding) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    return jax.device_put(value, sharding)


def num_shards(name: str, mesh: Mesh, rules: Rules) -> int:
    """Number of shards that the rules split an axis name into: a padded vocabulary is a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in _as_tuple(rules.get(name)))
