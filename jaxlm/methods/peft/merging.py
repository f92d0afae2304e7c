"""Merging: a trained change of a weight becomes part of the weight."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.core import LM, Quantized, Wrapper, map_leaves, materialize


def merging(kind: type[Wrapper]) -> Callable[[LM, dict[str, Any]], LM]:
    """`Method.bake` of a method that wraps weights in this class: what a leaf stands for, dense."""

    def bake(lm: LM, state: dict[str, Any]) -> LM:
        merged = map_leaves(lambda _, leaf: materialize(leaf) if isinstance(leaf, kind) else leaf, lm.params)
        return lm.replace(params=merged)

    return bake


def check_mergeable(who: str, path: str, leaf: Any) -> None:
    """Raises ValueError for a weight that quantizes its activations: what it is merged into would not.

    Args:
      who: the method, for messages.
    """
    parts = jax.tree.leaves(leaf, is_leaf=lambda part: isinstance(part, Quantized))
    if any(isinstance(part, Quantized) and part.activations is not None for part in parts):
        raise ValueError(
            f"{who}: {path} quantizes its inputs, and would not once the update is merged; quantize the weights alone "
            "(quantize with dynamic = False), or quantize in a later stage"
        )
