"""Batches between the host and the devices: rows to where the mesh wants them, and arrays of several hosts back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding

from jaxlm.parallel.sharding import spec_of, ways


def token_count(batch: Mapping[str, np.ndarray]) -> int:
    """Tokens of a batch that are not padding, on both sides."""
    masks = [batch[name] for name in ("segment_ids", "attention_mask", "decoder_attention_mask") if name in batch]
    return sum(int(np.count_nonzero(mask)) for mask in masks)


def to_devices(mesh: jax.sharding.Mesh, rules: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], Any]:
    """`global batch -> (its tokens, the batch on the devices)`.

    Every process makes the whole batch and gives its own devices their rows of it, whatever part of the mesh they are.
    """
    parts = ways("batch", mesh, rules)
    where = NamedSharding(mesh, spec_of(("batch",), (parts,), rules, mesh))

    def place(batch: dict[str, np.ndarray]) -> tuple[int, dict[str, jax.Array]]:
        rows = len(batch["input_ids"])
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows does not divide over the {parts} devices of config.mesh that share it; "
                f"make config.train.batch_size a multiple of {parts}"
            )
        placed: dict[str, jax.Array] = {
            n: jax.make_array_from_callback(a.shape, where, a.__getitem__) for n, a in batch.items()
        }
        return token_count(batch), placed

    return place


def batch_shapes(batches: Any, place: Callable) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Every shape of batch that can come, placed.

    Args:
      batches: `number -> batch`, of which there are `kinds`, one each at -1, -2, …
      place: `batch -> (its tokens, the batch on the devices)`.
    """
    placed = [place(batches(-1 - kind))[1] for kind in range(batches.kinds)]
    return [{n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in b.items()} for b in placed]


def gather_to_host(tree: Any) -> Any:
    """The tree with arrays whole on this process where they lie on the devices of several; others as they are."""
    return jax.tree.map(lambda a: a if a.is_fully_addressable else process_allgather(a, tiled=True), tree)
