"""What is left of every layer of a model directory: heads, FFN units, zeros, bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core import Tree, flatten, materialize
from jaxlm.evaluate.cost import bytes_by_tensor
from jaxlm.evaluate.row import Layer
from jaxlm.models.config import ModelConfig


def anatomy(config: ModelConfig, params: Tree, directory: str | Path) -> tuple[Layer, ...]:
    """Every layer of the stack, or of an encoder and then its decoder.

    Args:
      config: the structure.
      params: canonical view.
      directory: where the model is stored.
    """
    flat, stored = flatten(params), bytes_by_tensor(directory)
    if not config.encoder_decoder:
        return _stack(flat, stored, "", "", config.num_heads, config.ffn_size)
    encoder = _stack(flat, stored, "encoder/", "e", config.num_heads, config.ffn_size)
    return encoder + _stack(flat, stored, "decoder/", "d", config.decoder_num_heads, config.decoder_ffn_size)


def _stack(
    flat: Mapping[str, Any], stored: Mapping[str, int], at: str, letter: str, heads: tuple, ffn: tuple
) -> tuple[Layer, ...]:
    found = []
    for i, (count, units) in enumerate(zip(heads, ffn, strict=True)):
        kernels = {p: leaf for p, leaf in flat.items() if p.startswith(f"{at}layers_{i}/") and p.endswith("/kernel")}
        entries = sum(int(np.prod(leaf.shape)) for leaf in kernels.values())
        zeros = sum(int((np.asarray(materialize(leaf)) == 0).sum()) for leaf in kernels.values())
        size = sum(_size(path, leaf, stored) for path, leaf in kernels.items())
        found.append(Layer(f"{letter}{i}", count, units, zeros / max(entries, 1), 8 * size / max(entries, 1)))
    return tuple(found)


def _size(path: str, leaf: Any, stored: Mapping[str, int]) -> int:
    """Bytes of a kernel in the file; transformers' layout has other names, and plain arrays only."""
    own = [size for name, size in stored.items() if name.startswith(path)]
    return sum(own) if own else int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
