"""Names that a config may use, and the functions behind them."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?` when a valid name is close, else the list of all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(valid)}"


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`, or a ValueError that names the nearest valid one.

    >>> lookup({"adamw": 1}, "adamw", "optimizer")
    1
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, table)}")
    return table[name]


def call(
    function: Callable[..., Any], arguments: Mapping[str, Any], what: str, *positional: Any, **keywords: Any
) -> Any:
    """`function(*positional, **keywords, **arguments)`, where `arguments` come from a config or a file.

    Every one of them must be a parameter of the function that is not taken yet.

    Raises:
      ValueError: for an argument that the function does not have (naming the nearest), or a required one left out.
    """
    parameters = inspect.signature(function).parameters
    taken = {*list(parameters)[: len(positional)], *keywords}
    for name in arguments:
        if name in taken or name not in parameters:
            raise ValueError(f"{what} has no option {name!r}; {nearest(name, parameters.keys() - taken)}")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind in named]
    missing = [n for n in required if n not in arguments and n not in taken]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}")
    return function(*positional, **keywords, **arguments)
