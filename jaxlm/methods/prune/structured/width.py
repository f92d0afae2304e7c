"""The width of the residual stream: one set of dimensions for every reader and writer, norm, table and head."""

import numpy as np
from jaxtyping import Int

from jaxlm.core import LM, Site, flatten, unflatten
from jaxlm.methods.prune.structured.slicing import cut

STREAM = ("embed", "embed_out", "pooled")
"""Axis names of the stream's width: that of its readers and writers, and of the two products inside a head that
transformers gives the same width."""


def narrow(lm: LM, kept: Int[np.ndarray, "stays"]) -> LM:
    """The model with only the `kept` dimensions of its residual stream.

    The width of a head does not change, and the scale of T5's tied output, `hidden^-½`, stays what it was: the factor
    goes into the last norm.
    """
    sizes, flat = lm.network.sizes(), flatten(lm.params)
    indices = dict.fromkeys(STREAM, np.asarray(kept))
    for path, leaf in flat.items():
        if not isinstance(leaf, Site):
            flat[path] = cut(leaf, lm.axes[path], sizes.get(path), indices, path)
    config = lm.config
    if config.scale_head and config.head in ("causal", "seq2seq"):
        last = ("decoder/" if config.encoder_decoder else "") + "final_norm/scale"
        flat[last] = flat[last] * (len(kept) / config.hidden_size) ** 0.5
    return lm.replace(config=config.replace(hidden_size=len(kept)), params=unflatten(flat))
