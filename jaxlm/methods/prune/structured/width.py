"""The width of the residual stream: one set of dimensions for every reader and writer, norm, table and head."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core import Axes, Site, Tree, flatten, unflatten
from jaxlm.methods.prune.structured.slicing import cut

STREAM = ("embed", "embed_out", "pooled")
"""Axis names of the stream's width: that of its readers and writers, and of the two products inside a head that
transformers gives the same width."""


def narrow(model: Any, params: Tree, axes: Mapping[str, Axes], kept: np.ndarray):
    """The model with only the `kept` dimensions of its residual stream: `(model, params, axes)`.

    The width of a head does not change, and the scale of T5's tied output, `hidden^-½`, stays what it was: the factor
    goes into the last norm.
    """
    sizes, flat = model.sizes(), flatten(params)
    indices = dict.fromkeys(STREAM, np.asarray(kept))
    for path, leaf in flat.items():
        if not isinstance(leaf, Site):
            flat[path] = cut(leaf, axes[path], sizes.get(path), indices, path)
    config = model.config
    if config.scale_head and config.head in ("causal", "seq2seq"):
        last = ("decoder/" if config.encoder_decoder else "") + "final_norm/scale"
        flat[last] = flat[last] * (len(kept) / config.hidden_size) ** 0.5
    return model.replace(config.replace(hidden_size=len(kept))), unflatten(flat), dict(axes)
