"""Weights and Sites in a model directory: what they are, in JSON; their arrays are stored by name."""

import dataclasses
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core import Axes, Node, Scheme, Weight, call, checked, components, node_class, nodes
from jaxlm.core.paths import field_of
from jaxlm.io.safetensors import Tensor, is_float


def describe_node(node: Node) -> dict[str, Any]:
    """A Weight or Site without its arrays: type, static fields, the nodes inside it, and `null` for arrays it lacks.

    Raises:
      ValueError: for a class that loading would not know.
    """
    name = type(node).__name__
    if name not in nodes():
        raise ValueError(f"a {name} cannot be saved: no table in jaxlm/methods lists it, so it could not be loaded")
    description: dict[str, Any] = {"type": name}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not field.metadata.get("pytree_node", True):
            description[field.name] = dataclasses.asdict(value) if isinstance(value, Scheme) else value
        elif value is None:
            description[field.name] = None
        elif isinstance(value, Node):
            description[field.name] = describe_node(value)
    return description


def build_node(description: Mapping[str, Any], name: str, tensors: dict[str, Tensor], file: Path) -> Node:
    """The inverse of `describe_node`; takes the node's arrays out of `tensors`.

    Types are those of `core.catalog`, nothing else can be named.

    Args:
      name: of the node, which begins the names of its arrays.
      file: the one of the description, for messages.

    Raises:
      ValueError: an unknown type or number format, a static field or an array that is missing or not one of the type's.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"{file}: {name!r} is described by {reprlib.repr(description)}, expected a table with a type")
    try:
        cls = node_class(checked(description.get("type"), str, "its type"))
    except ValueError as error:
        raise ValueError(f"{file}: {name!r}: {error}") from None
    kinds, fields = typing.get_type_hints(cls), dict[str, Any]()
    for field in dataclasses.fields(cls):
        options = typing.get_args(kinds[field.name]) or (kinds[field.name],)
        if not field.metadata.get("pytree_node", True):
            if field.name not in description:
                raise ValueError(f"{file}: {name!r}: {cls.__name__} needs {field.name!r}")
            value = static_value(description[field.name], f"{file}: {name!r}: {field.name}")
            fields[field.name] = checked(value, kinds[field.name], f"{file}: {name!r}: {field.name}")
        elif field.name not in description:
            fields[field.name] = take_tensor(tensors, f"{name}.{field.name}", file)
        elif description[field.name] is None and type(None) in options:
            fields[field.name] = None
        else:
            inner = build_node(description[field.name], f"{name}.{field.name}", tensors, file)
            if not any(isinstance(option, type) and isinstance(inner, option) for option in options):
                raise ValueError(f"{file}: {name!r}: {field.name} cannot be a {type(inner).__name__}")
            fields[field.name] = inner
    unknown = description.keys() - fields.keys() - {"type"}
    if unknown:
        raise ValueError(f"{file}: {name!r}: {cls.__name__} has no field {min(unknown)!r}")
    return cls(**fields)


def check_node(node: Node, axes: Axes, name: str, file: Path) -> None:
    """Checks the parts of a node against each other: their dtypes, and the sizes that follow from its axes.

    Args:
      axes: of what the node stands for; names that two parts share have one size.

    Raises:
      ValueError: naming the part.
    """
    sizes: dict[Any, int] = {}
    for field, part in components(node, axes).items():
        array, owner = field_of(node, field), field_of(node, field.rpartition(".")[0])
        last = field.rpartition(".")[2]
        what = f"{file}: {name}.{field} is {array.dtype} {list(array.shape)}"
        if not _fits(owner, last, array.dtype):
            raise ValueError(f"{what}, which is no dtype of {last!r} in a {type(owner).__name__}")
        if len(array.shape) != len(part.axes):
            raise ValueError(f"{what}, expected {len(part.axes)} dimensions")
        if last in ("scale", "zero") and hasattr(owner, "scheme"):
            continue  # their sizes are those of groups, below
        for axis, size in zip(part.axes, array.shape, strict=True):
            if axis is not None and sizes.setdefault(axis, size) != size:
                raise ValueError(f"{what}, expected {sizes[axis]} along {axis!r} as in the parts before")
    _check_static(node, name, file)


def _fits(owner: Node, field: str, dtype: np.dtype) -> bool:
    """Whether a part of a node may have a dtype."""
    exact = {"mask": np.bool_, "groups": np.int32, "zero": np.int8, "input_zero": np.int8, "codes": np.uint8}
    if field == "codes" and hasattr(owner, "scheme"):
        return dtype == owner.scheme.dtype
    return dtype == exact[field] if field in exact else is_float(dtype)


def _check_static(node: Node, name: str, file: Path) -> None:
    """Static fields that choose how a weight computes, and the shapes of the scales that go with its format."""
    static = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    for field, good in (
        ("channel", lambda value: value in (-1, -2)),
        ("rate", lambda value: 0 <= value < 1),
        ("dtype_name", lambda value: value in ("float32", "bfloat16", "float16", "float64")),
    ):
        if field in static and not good(static[field]):
            raise ValueError(f"{file}: {name!r}: {field} cannot be {reprlib.repr(static[field])}")
    for field, inner in static.items():
        if isinstance(inner, Node):
            _check_static(inner, f"{name}.{field}", file)
    if "scheme" not in static or not isinstance(node, Weight):
        return
    scheme, activations, shape = static["scheme"], static["activations"], list(node.shape)
    present = {
        "zero": not scheme.symmetric,
        "input_scale": activations is not None and activations.group == "tensor",
        "input_zero": activations is not None and activations.group == "tensor" and not activations.symmetric,
    }
    for field, wanted in present.items():
        if field in static and (static[field] is not None) != wanted:
            raise ValueError(f"{file}: {name!r}: its format {'needs' if wanted else 'has no'} {field}")
    axis = -3 - static["channel"]
    shape[axis] = scheme.groups(shape[axis])
    for field in ("scale", "zero"):
        expected = [1, 1] if scheme.group == "tensor" else shape
        if static.get(field) is not None and list(static[field].shape) != expected:
            raise ValueError(
                f"{file}: {name}.{field} has the shape {list(static[field].shape)}, expected {expected} for {scheme}"
            )


def static_value(value: Any, what: str) -> Any:
    """A static field from JSON: a table stands for the Scheme that it holds, a list for a tuple."""
    if not isinstance(value, Mapping):
        return tuples(value)
    kinds = typing.get_type_hints(Scheme)
    try:
        return call(Scheme, {k: checked(v, kinds.get(k, Any), k) for k, v in value.items()}, "its format")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def take_tensor(tensors: dict[str, Tensor], name: str, file: Path) -> Tensor:
    """Removes a tensor from the stored ones."""
    if name not in tensors:
        raise ValueError(f"{file.parent} lacks the tensor {name!r}, which {file.name} expects")
    return tensors.pop(name)


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
