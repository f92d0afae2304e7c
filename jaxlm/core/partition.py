"""Trainable and frozen: only the trainable part is differentiated and only it has optimizer state."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.paths import ArrayInfo, Tree, arrays, with_arrays

Verdict = Callable[[ArrayInfo], bool | None]
"""Whether one array trains; `None` leaves the answer to others."""

NEVER_TRAINED = frozenset({"mask", "codes", "buffer"})


def trainable(verdicts: Sequence[Verdict], info: ArrayInfo) -> bool:
    """The last verdict that is not None wins; masks, codes and buffers never train."""
    if info.role in NEVER_TRAINED:
        return False
    answers = [answer for verdict in verdicts if (answer := verdict(info)) is not None]
    return answers[-1] if answers else True


def trained_names(infos: Mapping[str, ArrayInfo], verdicts: Sequence[Verdict] = ()) -> frozenset[str]:
    """Names of the arrays that train.

    >>> from jaxlm.core import describe
    >>> sorted(trained_names(describe({"a": 1.0, "b": 2.0}), [lambda info: info.path != "b"]))
    ['a']
    """
    return frozenset(name for name, info in infos.items() if trainable(verdicts, info))


def partition(params: Tree, trained: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(trained, frozen)`, each a flat dict by array name, from the names of what trains.

    >>> partition({"a": 1.0, "b": 2.0}, {"a"})
    ({'a': 1.0}, {'b': 2.0})
    """
    values = arrays(params)
    return (
        {name: value for name, value in values.items() if name in trained},
        {name: value for name, value in values.items() if name not in trained},
    )


def merge(template: Tree, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `partition`; `template` gives the structure."""
    return with_arrays(template, {**frozen, **trained})


def widened(params: Tree, trained: Collection[str]) -> dict[str, Any]:
    """Parameters (arrays or shapes) whose trained floats are float32; what is frozen keeps its dtype.

    Most public checkpoints are bfloat16. Adam's steps are smaller than the spacing of bfloat16 numbers, so most updates
    would be rounded away.

    >>> tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    >>> {name: a.dtype.name for name, a in widened(tree, {"a"}).items()}
    {'a': 'float32', 'b': 'bfloat16'}
    """

    def wide(array: Any) -> Any:
        if array.dtype == jnp.float32 or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=array.sharding)
        return array.astype(jnp.float32)

    return with_arrays(params, {name: wide(a) if name in trained else a for name, a in arrays(params).items()})
