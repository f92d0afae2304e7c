"""Many devices: the mesh, shardings from axis names, a padded vocabulary, and planning ahead of time."""

from jaxlm.parallel.mesh import MESH_AXES, initialize, make_mesh, mesh_sizes
from jaxlm.parallel.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    Place,
    make_rules,
    notices,
    place,
    shard_batch,
    shard_tree,
    shardings,
    spec_of,
    ways,
)
from jaxlm.parallel.vocab_padding import mask_padded_logits, pad_vocab, unpad_vocab

__all__ = [
    "ACTIVATION_RULES",
    "MESH_AXES",
    "PARAMETER_RULES",
    "Place",
    "initialize",
    "make_mesh",
    "make_rules",
    "mask_padded_logits",
    "mesh_sizes",
    "notices",
    "pad_vocab",
    "place",
    "shard_batch",
    "shard_tree",
    "shardings",
    "spec_of",
    "unpad_vocab",
    "ways",
]
