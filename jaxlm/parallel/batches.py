"""Batches on the devices of a mesh, and arrays that are spread over several hosts gathered on one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding

from jaxlm.parallel.sharding import num_shards, spec_of


def token_count(batch: Mapping[str, np.ndarray]) -> int:
    """Tokens of a batch that are not padding, those of the decoder included."""
    masks = [batch[name] for name in ("segment_ids", "attention_mask", "decoder_attention_mask") if name in batch]
    return sum(int(np.count_nonzero(mask)) for mask in masks)


def to_devices(mesh: jax.sharding.Mesh, rules: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], Any]:
    """`global batch -> (its tokens, the batch on the devices)`.

    Every process makes the whole batch and passes each of its devices the rows of that device. The function raises
    ValueError for a batch whose rows do not divide over the devices.
    """
    parts = num_shards("batch", mesh, rules)
    sharding = NamedSharding(mesh, spec_of(("batch",), (parts,), rules, mesh))

    def to_device(batch: dict[str, np.ndarray]) -> tuple[int, dict[str, jax.Array]]:
        rows = len(batch["input_ids"])
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows does not divide over the {parts} devices of config.mesh that share it; "
                f"make config.train.batch_size a multiple of {parts}"
            )
        arrays: dict[str, jax.Array] = {
            name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            for name, array in batch.items()
        }
        return token_count(batch), arrays

    return to_device


def batch_shapes(batches: Any, to_device: Callable) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Every shape of batch that can occur, with its shardings.

    Args:
      batches: `step -> batch` with `kinds` distinct shapes; steps -1, -2, … give one batch of each.
      to_device: `batch -> (its tokens, the batch on the devices)`.
    """
    on_devices = [to_device(batches(-1 - kind))[1] for kind in range(batches.kinds)]
    return [{n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in b.items()} for b in on_devices]


def gather_to_host(tree: Any) -> Any:
    """The tree with whole arrays: those spread over several processes are gathered, the others returned unchanged."""
    return jax.tree.map(lambda a: a if a.is_fully_addressable else process_allgather(a, tiled=True), tree)
