"""Padding of the vocabulary to a multiple of its shards: added in a run, masked in the logits, removed on save."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Axes, Tree, arrays, describe, with_arrays


def pad_vocab(params: Tree, axes: Mapping[str, Axes], multiple: int) -> dict[str, Any]:
    """Zero rows and columns so that every dimension named `vocab` is a multiple of `multiple`, in Weights too.

    Padded rows are never looked up and, once their logits are masked, receive exactly zero gradients.
    """
    if multiple < 1:
        raise ValueError(f"cannot pad the vocabulary to a multiple of {multiple}; use a positive number")
    return _resize(params, axes, lambda size: -size % multiple + size)


def unpad_vocab(params: Tree, axes: Mapping[str, Axes], size: int) -> dict[str, Any]:
    """The inverse of `pad_vocab`: the first `size` entries of every dimension named `vocab`."""
    return _resize(params, axes, lambda _: size)


def _resize(params: Tree, axes: Mapping[str, Axes], new_size) -> dict[str, Any]:
    values = arrays(params)
    for name, info in describe(params, axes).items():
        for dimension, axis in enumerate(info.axes or ()):
            if axis == "vocab":
                values[name] = _fit(name, values[name], dimension, new_size(values[name].shape[dimension]))
    return with_arrays(params, values)


def _fit(name: str, x: Any, dimension: int, size: int) -> Any:
    old_size = x.shape[dimension]
    if size == old_size:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*x.shape[:dimension], size, *x.shape[dimension + 1 :]), x.dtype)
    if size > old_size:
        return jnp.pad(x, [(0, size - old_size if d == dimension else 0) for d in range(x.ndim)])
    return jax.lax.slice_in_dim(x, 0, size, axis=dimension)


def mask_padded_logits(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits `[..., padded vocab]` with those of padded entries set to the dtype's lowest finite number.

    Their probability and their gradient are exactly 0; they are finite, so that `0 · log 0` in a cross-entropy is 0. A
    mean of log-probabilities over the vocabulary (label smoothing) must leave them out.

    >>> mask_padded_logits(jnp.zeros((1, 3)), 2).argmin().item()
    2
    """
    if logits.shape[-1] == vocab_size:
        return logits
    if logits.shape[-1] < vocab_size:
        raise ValueError(f"logits over {logits.shape[-1]} entries for a vocabulary of {vocab_size}")
    real = jnp.arange(logits.shape[-1]) < vocab_size
    return jnp.where(real, logits, jnp.finfo(logits.dtype).min)
