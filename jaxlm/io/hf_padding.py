"""Sizes that transformers can express, reached with zeros: the same function in a larger model.

transformers has one number of heads and one FFN width for all layers, and in BERT and GPT-2 the width of a head is
`hidden / heads`. Heads that a model lacks are added with zero weights (their output rows are zero: they add nothing),
FFN units likewise. A head that must be wider gets zero dimensions, which add nothing to `q·k`; where scores are divided
by the root of the width, queries are scaled by the root of its growth.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.core import Node, flatten, unflatten
from jaxlm.io.safetensors import Tensor
from jaxlm.models import FAMILIES
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import NotExpressible, config_to_hf
from jaxlm.models.network import Network


def pad_model(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the tensors (canonical view, read when they are asked for) of the padded model.

    Raises:
      NotExpressible: no padding helps, or a leaf is no plain tensor.
    """
    flat = flatten(params)
    for path, leaf in flat.items():
        if isinstance(leaf, Node):
            raise NotExpressible(f"transformers has no {type(leaf).__name__} ({path}); bake the model first")
    reasons: list[str] = []
    for target in larger(config):
        try:
            config_to_hf(FAMILIES[config.family], target)
        except NotExpressible as error:
            reasons.append(str(error))
            continue
        return target, unflatten({path: _padded(config, target, path, leaf) for path, leaf in flat.items()})
    raise NotExpressible(f"{reasons[0]}; {_no_room(config)}")


def larger(config: ModelConfig) -> Iterator[ModelConfig]:
    """Configs of uniform sizes with room for a model, the smallest first: heads keep their width, or fill hidden."""
    groups = max((1, *config.num_kv_heads, *(config.decoder_num_heads or ()), *(config.cross_num_heads or ())))
    for table in (config.position_heads, config.decoder_position_heads):
        groups = max((groups, *(column + 1 for row in table or () for column in row)))
    per_group = max(h // max(kv, 1) for h, kv in zip(config.num_heads, config.num_kv_heads, strict=True))
    units = max((*config.ffn_size, *(config.decoder_ffn_size or ())))
    width, hidden = head_width(config), config.hidden_size
    divisors = [n for n in range(groups, hidden // per_group + 1) if hidden % (n * per_group) == 0]
    shapes = [(groups, width), *((n, width) for n in divisors)]
    if config.rotary is None:  # the pairs that rotary positions turn depend on the width
        shapes += [(n, hidden // (n * per_group)) for n in divisors if hidden // (n * per_group) >= width]
    for heads, width in shapes:
        decoder: dict[str, Any] = {}
        if config.encoder_decoder:
            decoder = {"decoder_num_heads": heads, "cross_num_heads": heads, "decoder_ffn_size": units}
        yield config.replace(
            num_heads=heads * per_group,
            num_kv_heads=heads,
            head_dim=width,
            ffn_size=units,
            position_heads=None,
            decoder_position_heads=None,
            **decoder,
        )


def head_width(config: ModelConfig) -> int:
    """Width of a head, which every finished config has."""
    assert config.head_dim is not None
    return config.head_dim


def _no_room(config: ModelConfig) -> str:
    return (
        f"transformers wants hidden_size {config.hidden_size} divided by the number of heads, and no number from "
        f"{max(config.num_heads)} on leaves room for heads of {config.head_dim}: prune fewer hidden dimensions, more "
        f"heads, or in a multiple"
    )


def _padded(config: ModelConfig, target: ModelConfig, path: str, tensor: Tensor) -> Tensor:
    before, after = (Network(c).sizes()[path] for c in (config, target))
    factor = 1.0
    if "/query/" in path and config.scale_scores:
        factor = (head_width(target) / head_width(config)) ** 0.5
    if before == after and factor == 1.0:
        return tensor
    names = [
        name for entry in Network(config).axes()[path] for name in (entry if isinstance(entry, tuple) else (entry,))
    ]
    places = [np.arange(size) for dim in before for size in dim]
    columns = config.decoder_position_heads if path.startswith("decoder/") else config.position_heads
    if columns and "/attention/" in path and "kv_heads" in names:  # the bias of a head is the column of its place
        layer = int(path.split("layers_")[1].split("/")[0])
        places[names.index("kv_heads")] = np.array(columns[layer], int)
    flat_before, flat_after = (tuple(size for dim in sizes for size in dim) for sizes in (before, after))
    shape = tuple(int(np.prod(dim)) for dim in after)

    def read(dtype: Any = None) -> np.ndarray:
        array = tensor.read(dtype)
        out = np.zeros(flat_after, array.dtype)
        out[np.ix_(*places)] = (array * np.asarray(factor, array.dtype)).reshape(flat_before)
        return out.reshape(shape)

    return Tensor(shape, tensor.dtype, read, tensor.location)
