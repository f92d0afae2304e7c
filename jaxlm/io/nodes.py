"""Weights and Sites in a model directory: what they are, in JSON; their arrays are stored by name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core import SITES, WEIGHTS, Node, Scheme, call, lookup
from jaxlm.io.tensors import Tensor


def describe_node(node: Node) -> dict[str, Any]:
    """A Weight or Site without its arrays: type, static fields, the nodes inside it, and `null` for arrays it lacks."""
    description: dict[str, Any] = {"type": type(node).__name__}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not field.metadata.get("pytree_node", True):
            description[field.name] = dataclasses.asdict(value) if isinstance(value, Scheme) else value
        elif value is None:
            description[field.name] = None
        elif isinstance(value, Node):
            description[field.name] = describe_node(value)
    return description


def build_node(description: Mapping[str, Any], name: str, tensors: dict[str, Tensor], where: Path) -> Node:
    """The inverse of `describe_node`; takes the node's arrays out of `tensors`.

    Types are those of the registries of core, nothing else can be named.

    Args:
      name: of the node, which begins the names of its arrays.
      where: the file of the description, for messages.

    Raises:
      ValueError: an unknown type or number format, a static field or an array that is missing or not one of the type's.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"{where}: {name!r} is described by {description!r}, expected a table with a type")
    try:
        cls: type[Node] = lookup({**WEIGHTS, **SITES}, str(description.get("type")), "type")
    except ValueError as error:
        raise ValueError(f"{where}: {name!r}: {error}") from None
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if not field.metadata.get("pytree_node", True):
            if field.name not in description:
                raise ValueError(f"{where}: {name!r}: {cls.__name__} needs {field.name!r}")
            fields[field.name] = static_value(description[field.name], f"{where}: {name!r}: {field.name}")
        elif field.name in description and description[field.name] is None:
            fields[field.name] = None
        elif field.name in description:
            fields[field.name] = build_node(description[field.name], f"{name}.{field.name}", tensors, where)
        else:
            fields[field.name] = take_tensor(tensors, f"{name}.{field.name}", where)
    unknown = description.keys() - fields.keys() - {"type"}
    if unknown:
        raise ValueError(f"{where}: {name!r}: {cls.__name__} has no field {min(unknown)!r}")
    return cls(**fields)


def static_value(value: Any, where: str) -> Any:
    """A static field from JSON: a table stands for the Scheme that it holds, a list for a tuple."""
    if not isinstance(value, Mapping):
        return tuples(value)
    try:
        return call(Scheme, value, "its format")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def take_tensor(tensors: dict[str, Tensor], name: str, where: Path) -> Tensor:
    """Removes a tensor from the stored ones."""
    if name not in tensors:
        raise ValueError(f"{where.parent} lacks the tensor {name!r}, which {where.name} expects")
    return tensors.pop(name)


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
