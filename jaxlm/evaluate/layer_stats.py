"""What is left of every layer of a model directory: heads, FFN units, width, zeros, bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core import Tree, flatten, materialize
from jaxlm.evaluate.comparison import Layer
from jaxlm.evaluate.cost import bytes_by_tensor
from jaxlm.models.config import ModelConfig


def layer_statistics(config: ModelConfig, params: Tree, directory: str | Path) -> tuple[Layer, ...]:
    """Every layer of the stack, or of an encoder and then its decoder.

    Args:
      config: the structure.
      params: canonical view.
      directory: where the model is stored.
    """
    flat, stored = flatten(params), bytes_by_tensor(directory)
    if not config.encoder_decoder:
        return _stack(config, flat, stored)
    return _stack(config, flat, stored, "encoder/") + _stack(config, flat, stored, "decoder/")


def _stack(config: ModelConfig, flat: Mapping[str, Any], stored: Mapping[str, int], at: str = "") -> tuple[Layer, ...]:
    structure = config.decoder_layers() if at == "decoder/" else config.layers()
    layers = []
    for i, layer in enumerate(structure):
        kernels = {p: leaf for p, leaf in flat.items() if p.startswith(f"{at}layers_{i}/") and p.endswith("/kernel")}
        entries = max(sum(int(np.prod(leaf.shape)) for leaf in kernels.values()), 1)
        zeros = sum(int((np.asarray(materialize(leaf)) == 0).sum()) for leaf in kernels.values())
        size = sum(_bytes_of(path, leaf, stored) for path, leaf in kernels.items())
        layers.append(
            Layer(
                name=f"{at[:1]}{i}",
                heads=layer.kv_heads * layer.q_per_kv,
                groups=layer.kv_heads,
                ffn=layer.ffn,
                width=layer.hidden,
                zeros=zeros / entries,
                bits=8 * size / entries,
            )
        )
    return tuple(layers)


def _bytes_of(path: str, leaf: Any, stored: Mapping[str, int]) -> int:
    """Bytes of a kernel in the file; transformers' layout has other names, and plain arrays only."""
    sizes = [size for name, size in stored.items() if name.startswith(path)]
    return sum(sizes) if sizes else int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
