"""Trainable and frozen: only the trainable part is differentiated and only it has optimizer state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.core.paths import ArrayInfo, Tree, arrays, describe, with_arrays

Verdict = Callable[[ArrayInfo], bool | None]
"""Says of one array whether it trains; `None` leaves the answer to others."""

NEVER_TRAINED = frozenset({"mask", "codes", "buffer"})


def trainable(verdicts: Sequence[Verdict], info: ArrayInfo) -> bool:
    """The last verdict that is not None wins; masks, codes and buffers never train."""
    if info.role in NEVER_TRAINED:
        return False
    answers = [answer for verdict in verdicts if (answer := verdict(info)) is not None]
    return answers[-1] if answers else True


def partition(params: Tree, verdicts: Sequence[Verdict] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(trained, frozen)`, each a flat dict by array name.

    >>> partition({"a": 1.0, "b": 2.0}, [lambda info: info.path != "b"])
    ({'a': 1.0}, {'b': 2.0})
    """
    infos, values = describe(params), arrays(params)
    chosen = {name for name, info in infos.items() if trainable(verdicts, info)}
    return (
        {name: value for name, value in values.items() if name in chosen},
        {name: value for name, value in values.items() if name not in chosen},
    )


def merge(template: Tree, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `partition`; `template` gives the structure."""
    return with_arrays(template, {**frozen, **trained})
