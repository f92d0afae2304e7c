"""Whole layers: which go, and the renumbering of those that stay."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.core import LM, NO_DATA, Axes, Gate, SurgeryContext, flatten, lookup, unflatten
from jaxlm.methods.prune.structured.scores import block_influence, check_finite, taylor_of
from jaxlm.methods.prune.structured.slicing import cut

COUNTS = {"": "num_layers", "encoder/": "num_layers", "decoder/": "num_decoder_layers"}
"""The field of the config that counts the layers of a stack."""
PER_LAYER = {
    "num_layers": ("num_heads", "num_kv_heads", "ffn_size", "position_heads"),
    "num_decoder_layers": ("decoder_num_heads", "cross_num_heads", "decoder_ffn_size", "decoder_position_heads"),
}
"""Fields of the config with one entry a layer, by the field that counts the layers."""


def stacks(config: Any) -> tuple[str, ...]:
    """Prefixes of the stacks of a model."""
    return ("encoder/", "decoder/") if config.encoder_decoder else ("",)


def without_layers(lm: LM, gone: Collection[str]) -> LM:
    """The model without the layers at the paths `gone`, the rest renumbered.

    Raises:
      ValueError: nothing would stay of a stack, or its layers share their parameters.
    """
    flat, axes, config = flatten(lm.params), dict(lm.axes), lm.config
    if gone and (config.layer_map or config.decoder_layer_map):
        raise ValueError(
            "layers that share their parameters cannot be removed one by one: put the surgery unshare first"
        )
    for stack in stacks(config):
        count = COUNTS[stack]
        stay = [i for i in range(getattr(config, count)) if f"{stack}layers_{i}" not in gone]
        if not stay:
            raise ValueError(f"every layer of {stack or 'the stack'} is closed; at least one must stay")
        numbers = {old: new for new, old in enumerate(stay)}
        flat, axes = _renumbered(flat, stack, numbers), _renumbered(axes, stack, numbers)
        changes = {f: tuple(getattr(config, f)[i] for i in stay) for f in PER_LAYER[count] if getattr(config, f)}
        if count == "num_layers" and config.window_from:
            changes["window_from"] = sum(i < config.window_from for i in stay)
        config = config.replace(**{count: len(stay)}, **changes)
    flat, config = read_columns(flat, axes, config)
    return lm.replace(config=config, params=unflatten(flat), axes=axes)


def _renumbered(flat: Mapping[str, Any], stack: str, numbers: Mapping[int, int]) -> dict[str, Any]:
    """Drops the paths of layers without a number, and numbers those that stay."""
    kept: dict[str, Any] = {}
    for path, value in flat.items():
        in_layer = re.fullmatch(rf"{stack}layers_(\d+)(/.*)", path)
        if in_layer is None:
            kept[path] = value
        elif int(in_layer[1]) in numbers:
            kept[f"{stack}layers_{numbers[int(in_layer[1])]}{in_layer[2]}"] = value
    return kept


def read_columns(flat: Mapping[str, Any], axes: Mapping[str, Axes], config: Any) -> tuple[dict[str, Any], Any]:
    """T5's tables of relative positions without the columns that no head reads any more, and the config to them.

    Where the heads of every layer read all columns in order, the config says nothing, and transformers can read the
    model.
    """
    flat = dict(flat)
    for stack, field in zip(stacks(config), ("position_heads", "decoder_position_heads"), strict=False):
        if columns := getattr(config, field):
            path = f"{stack}relative_positions/embedding"
            read = sorted({column for row in columns for column in row})
            flat[path] = cut(flat[path], axes[path], None, {"position_heads": np.array(read)}, path)
            rows = tuple(tuple(map(read.index, row)) for row in columns)
            config = config.replace(**{field: None if set(rows) == {tuple(range(len(read)))} else rows})
    return flat, config


def keep_layers(lm: LM, context: SurgeryContext = NO_DATA, *, keep: tuple[int, ...]) -> LM:
    """Surgery: keeps the listed layers of a single stack, in order (a student of fewer layers starts like this).

    Source: Sanh et al. 2019, DistilBERT, arXiv:1910.01108; Sajjad et al. 2020, arXiv:2004.03844.

    When: a student of fewer layers begins from its teacher; which layers to keep is chosen on a development set.

    Args:
      keep: numbers of the layers that stay, from 0.
    """
    if lm.config.encoder_decoder:
        raise ValueError("keep_layers: an encoder-decoder has two stacks; use drop_layers, or close gates and shrink")
    missing = [i for i in keep if not 0 <= i < lm.config.num_layers]
    if missing or not keep:
        raise ValueError(f"keep_layers: layers {missing or 'none'} chosen of 0..{lm.config.num_layers - 1}")
    gone = {f"layers_{i}" for i in range(lm.config.num_layers) if i not in keep}
    return without_layers(lm, gone)


def drop_layers(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    share: float,
    score: str = "block_influence",
) -> LM:
    """Surgery: removes the `share` of the layers of each stack with the smallest scores, at least one stays.

    Source: Men et al. 2024, ShortGPT, arXiv:2403.03853.

    When: a single request must become faster and calibration data should say which layers go; distil afterwards.

    Args:
      share: of the layers, in [0, 1).
      score: both read calibration data: `block_influence`, how much a layer turns the residual stream, or `taylor`, how
        much the task's loss would change.
    """
    if not 0 <= share < 1:
        raise ValueError(f"drop_layers: share must be in [0, 1), not {share}")
    scores = check_finite(
        lookup({"block_influence": block_influence, "taylor": _taylor}, score, "score")(lm, context), score
    )
    gone: set[str] = set()
    for stack in stacks(lm.config):
        layers = [f"{stack}layers_{i}" for i in range(getattr(lm.config, COUNTS[stack]))]
        drop = min(round(share * len(layers)), len(layers) - 1)
        gone |= set(sorted(layers, key=lambda path: float(scores[path]))[:drop])
    return without_layers(lm, gone)


def _taylor(lm: LM, context: SurgeryContext) -> dict[str, Any]:
    """`taylor_of` a gate on every layer, by path of the layer."""
    gates = {
        f"{stack}layers_{i}/gate": Gate(jnp.ones(()))
        for stack in stacks(lm.config)
        for i in range(getattr(lm.config, COUNTS[stack]))
    }
    scores = taylor_of(lm.replace(params=unflatten(flatten(lm.params) | gates)), context)
    return {path.removesuffix("/gate"): scores[path] for path in gates}
