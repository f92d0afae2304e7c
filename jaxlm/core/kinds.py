"""Values from configs and files, checked against the annotations of the fields that take them."""

import dataclasses
import numbers
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core.lookup import call

DESCRIPTIONS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
    dict: "a table",
}
_MISFIT = object()


def checked(value: Any, kind: Any, what: str) -> Any:
    """`value` as the annotation `kind` wants it: numpy's scalars become Python's, lists tuples, tables dataclasses.

    A truth value is no number, and a number with a fraction is not whole even where the fraction is 0.

    >>> checked([1, 2], tuple[int, ...] | None, "sizes")
    (1, 2)

    Args:
      kind: `int`, `float`, `bool`, `str`, `dict`, `Any`, a dataclass, a tuple of one of them, or a union of these.
      what: name of the value, for messages.

    Raises:
      ValueError: `what: expected a whole number, found 'x'`.
    """
    fitted = _fit(value, kind, what)
    if fitted is _MISFIT:
        raise ValueError(f"{what}: expected {_description(kind)}, found {reprlib.repr(value)}")
    return fitted


def check_fields(instance: Any, kinds: Mapping[str, Any]) -> None:
    """Replaces every field of a frozen dataclass by its `checked` value.

    Raises:
      ValueError: for a field of another kind, by name.
    """
    for field in dataclasses.fields(instance):
        value = checked(getattr(instance, field.name), kinds[field.name], field.name)
        object.__setattr__(instance, field.name, value)


def _fit(value: Any, kind: Any, what: str) -> Any:
    if kind is Any:
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        fits = (_fit(value, option, what) for option in typing.get_args(kind))
        return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return _MISFIT
        entries = tuple(_fit(entry, typing.get_args(kind)[0], what) for entry in value)
        return _MISFIT if any(entry is _MISFIT for entry in entries) else entries
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return call(typing.cast(type, kind), value, what)
    if kind is bool:
        return bool(value) if isinstance(value, bool | np.bool_) else _MISFIT
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else _MISFIT
    if kind is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return _MISFIT
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        return float(number) if abs(number) <= sys.float_info.max else _MISFIT  # not of NaN either
    if kind is dict:
        return value if isinstance(value, Mapping) else _MISFIT
    return value if isinstance(value, kind) else _MISFIT


def _description(kind: Any) -> str:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_description(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list, each entry {_description(typing.get_args(kind)[0])}"
    return DESCRIPTIONS.get(kind) or f"a table of {kind.__name__}"
