"""What the methods of quantization share: number formats from a config's arguments, targets, and bytes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import (
    Factored,
    FakeQuant,
    InputScaled,
    Quantized,
    Scheme,
    Tree,
    call,
    check_rules,
    describe,
    matches,
)
from jaxlm.core.weights.quantized import check_activations, per_token

KERNELS = r".*/kernel"
TABLES = r"embed/tokens/embedding"
TARGETS = f"{KERNELS}|{TABLES}"
"""What is quantized by default: every product, the head's included, and the token table, tied or not."""


def channel_of(path: str) -> int:
    """Rows of an embedding table own the scales (they are the outputs of a tied head), columns of a kernel."""
    return -2 if path.endswith("/embedding") else -1


def formats(
    who: str,
    *,
    bits: str,
    group: int | str | None,
    symmetric: bool,
    dynamic: bool | None = None,
    activations: Mapping[str, Any] | None = None,
) -> tuple[Scheme, Scheme | None]:
    """The formats of weights and of activations that a config names.

    Args:
      who: the method, for messages.
      bits, group, symmetric: see `Scheme`.
      dynamic: quantize activations a token at a time; `None` does it for int8 weights.
      activations: a Scheme of the activations by its fields, instead of the usual one.
    """
    try:
        scheme = Scheme(bits, group, symmetric)
        if activations is not None:
            if dynamic is False:
                raise ValueError("dynamic=False leaves the inputs in floats, but activations gives them a format")
            inputs: Scheme | None = call(Scheme, activations, "activations")
        else:
            inputs = per_token(scheme) if (bits == "int8" if dynamic is None else dynamic) else None
        check_activations(scheme, inputs)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    return scheme, inputs


def check_targets(params: Tree, targets: str, who: str) -> None:
    """Raises ValueError for targets that match nothing."""
    check_rules([(targets, None)], describe(params).values(), f"{who}: targets")


def is_target(path: str, leaf: Any, targets: str) -> bool:
    """Whether a surgery quantizes this leaf: a target that is not stored as codes yet."""
    return matches(targets, path) and not isinstance(leaf, Quantized)


def change_matrices(leaf: Any, change: Callable[[Any], Any]) -> Any:
    """`leaf` with `change(matrix)` for every matrix in it that inputs meet as such and that is not stored as codes: the
    base below scaled inputs, both factors of a Factored, else the leaf itself.

    >>> change_matrices(Factored(jnp.ones((4, 1)), jnp.ones((1, 4))), Quantized.of).b.codes.tolist()
    [[127, 127, 127, 127]]
    """
    if isinstance(leaf, InputScaled):
        return leaf.replace(base=change_matrices(leaf.base, change))
    if isinstance(leaf, Factored):
        return leaf.replace(a=change_matrices(leaf.a, change), b=change_matrices(leaf.b, change))
    return leaf if isinstance(leaf, Quantized) else change(leaf)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is quantized already, stored or in training."""
    return isinstance(leaf, FakeQuant | Quantized)


def stored_bytes(leaf: Any) -> int:
    """Bytes of a leaf in a file: four-bit integers two to a byte along the last dimension.

    >>> stored_bytes(Quantized.of(jnp.ones((6, 5)), Scheme("int4")))  # 6 · 3 bytes of codes, 5 scales of 4 bytes
    38
    """

    def array_bytes(array: Any) -> int:
        if array.dtype == jnp.int4:
            return math.prod(array.shape[:-1]) * math.ceil(array.shape[-1] / 2)
        return array.size * array.dtype.itemsize

    return sum(array_bytes(array) for array in jax.tree.leaves(leaf))
