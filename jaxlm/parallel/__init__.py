"""Many devices: the mesh, shardings from axis names, a padded vocabulary, and ahead-of-time planning."""

from jaxlm.parallel.mesh import DEFAULT_MESH, initialize, make_mesh, mesh_sizes
from jaxlm.parallel.sharding import make_rules, num_shards, place, shard_tree, shardings, spec_of
from jaxlm.parallel.vocab_padding import mask_padded_logits, pad_vocab, unpad_vocab

__all__ = [
    "DEFAULT_MESH",
    "initialize",
    "make_mesh",
    "make_rules",
    "mask_padded_logits",
    "mesh_sizes",
    "num_shards",
    "pad_vocab",
    "place",
    "shard_tree",
    "shardings",
    "spec_of",
    "unpad_vocab",
]
