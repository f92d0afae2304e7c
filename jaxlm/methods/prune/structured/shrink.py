"""Shrink: what closed gates switch off is cut out of every array that carries the gated axis name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from jaxlm.core import LM, Axes, Gate, Switch, Tree, flatten, unflatten
from jaxlm.methods.prune.structured.depth import stacks, without_layers
from jaxlm.methods.prune.structured.slicing import Kept, cut, scale
from jaxlm.methods.prune.structured.width import narrow

FOLDED = {"attention": "output", "cross_attention": "output", "mlp": "down"}
"""The product that reads what a module's gate lets through: half-open gates go into its rows."""


class Closed(NamedTuple):
    """What the gates of a model leave and remove.

    Attributes:
      kept: by path of the module, what stays of it.
      gone: paths of the layers that go.
      stream: dimensions of the residual stream that stay, or `None` where it has no gate.
    """

    kept: dict[str, Kept]
    gone: set[str]
    stream: Int[np.ndarray, "stays"] | None


def shrink(lm: LM) -> LM:
    """Surgery: removes what closed gates switch off, and the gates.

    Every array under a gated module is sliced along each dimension that carries the gated axis name, compound ones
    included, whatever the family and whatever Weight holds it; layers whose own gate is 0 go, and the rest are
    renumbered; a closed dimension of the residual stream goes everywhere. The result computes what the gated model did.

    Gates of layers and of the stream must be 0 or 1. Those of heads and units may be half open: the factor goes into
    the rows of the product that follows.

    Returns:
      the smaller model, its config's sizes adjusted.

    Raises:
      ValueError: a half-open gate that cannot be folded, query heads in unequal numbers, or nothing left of a stack.
    """
    sizes, axes = lm.network.sizes(), dict(lm.axes)
    params, closed = read_gates(lm.params, axes, sizes)
    flat = flatten(params)
    for path, leaf in flat.items():
        owner = next((module for module in closed.kept if path.startswith(f"{module}/")), None)
        if owner is not None:
            flat[path] = cut(leaf, axes[path], sizes.get(path), closed.kept[owner], path)
    lm = lm.replace(config=resized(lm.config, closed.kept), params=unflatten(flat), axes=axes)
    lm = without_layers(lm, closed.gone)
    return lm if closed.stream is None else narrow(lm, closed.stream)


def read_gates(params: Tree, axes: dict[str, Axes], sizes: Mapping[str, Any]) -> tuple[dict[str, Any], Closed]:
    """The parameters without gates (`axes` loses their names), half-open ones folded; and what is closed."""
    flat = flatten(params)
    closed = Closed({}, set(), None)
    for path in [path for path, leaf in flat.items() if isinstance(leaf, Switch)]:
        gate = flat.pop(path)
        del axes[path]
        if not isinstance(gate, Gate):
            raise ValueError(f"{path} holds a {type(gate).__name__}, which is still learning: bake its method first")
        value = np.asarray(gate.value, np.float32)
        module = path.removesuffix("/gate")
        kind = module.rpartition("/")[2]
        if path == "hidden":
            closed = closed._replace(stream=np.flatnonzero(_binary(path, value)))
        elif kind not in FOLDED:
            if not _binary(path, value):
                closed.gone.add(module)
        else:
            closed.kept[module] = kept_of(path, value)
            if not np.isin(value, (0.0, 1.0)).all():
                kernel = f"{module}/{FOLDED[kind]}/kernel"
                flat[kernel] = scale(flat[kernel], axes[kernel], sizes[kernel], value, kernel)
    return unflatten(flat), closed


def kept_of(path: str, value: Float[np.ndarray, "*gates"]) -> Kept:
    """What stays of the module of a gate: FFN units, or KV groups and the query heads of each."""
    if path.endswith("mlp/gate"):
        return {"ffn": np.flatnonzero(value)}
    heads = value[..., 0]  # [groups, queries] or [groups, 1]
    groups = np.flatnonzero(heads.any(axis=1))
    if heads.shape[1] == 1:
        return {"kv_heads": groups}
    rows = [np.flatnonzero(heads[group]) for group in groups]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{path}: KV groups keep {[len(row) for row in rows]} query heads; all must keep as many")
    return {"kv_heads": groups, "q_per_kv": np.stack(rows) if rows else np.zeros((0, 0), int)}


def _binary(path: str, value: Float32[np.ndarray, "*gates"]) -> Float32[np.ndarray, "*gates"]:
    """The value of a gate, or a ValueError where it is half open."""
    if not np.isin(value, (0.0, 1.0)).all():
        raise ValueError(
            f"{path}: a gate must be 0 or 1 to be removed, found {float(value.min())}..{float(value.max())}"
        )
    return value


def resized(config: Any, kept: Mapping[str, Kept]) -> Any:
    """The config with the widths that remain in the modules at the paths of `kept`."""
    changes: dict[str, Any] = {}
    for stack in stacks(config):
        changes |= _stack_widths(config, stack, kept)
    return config.replace(**changes)


def _stack_widths(config: Any, stack: str, kept: Mapping[str, Kept]) -> dict[str, Any]:
    """Widths of the layers of one stack, by the config's fields."""
    decoder = stack == "decoder/"
    layers = range(config.num_decoder_layers if decoder else config.num_layers)
    owners = config.owners(decoder)

    def kept_in(i: int, module: str) -> Kept:
        return kept.get(f"{stack}layers_{owners[i]}/{module}", {})

    def width(i: int, module: str, axis: str, before: int) -> int:
        return len(kept_in(i, module).get(axis, range(before)))

    changes: dict[str, Any] = {}

    # Attention: the heads of a decoder, and of its cross-attention; elsewhere KV groups times queries a group.
    if decoder:
        heads, cross = config.decoder_num_heads, config.cross_num_heads
        changes["decoder_num_heads"] = tuple(width(i, "attention", "kv_heads", heads[i]) for i in layers)
        changes["cross_num_heads"] = tuple(width(i, "cross_attention", "kv_heads", cross[i]) for i in layers)
    else:
        heads, groups = config.num_heads, config.num_kv_heads
        queries = [heads[i] // max(groups[i], 1) for i in layers]
        kept_groups = tuple(width(i, "attention", "kv_heads", groups[i]) for i in layers)
        kept_queries = [
            np.shape(kept_in(i, "attention").get("q_per_kv", np.zeros((1, queries[i]))))[-1] for i in layers
        ]
        changes["num_kv_heads"] = kept_groups
        changes["num_heads"] = tuple(n * q for n, q in zip(kept_groups, kept_queries, strict=True))

    # FFN units.
    ffn = "decoder_ffn_size" if decoder else "ffn_size"
    changes[ffn] = tuple(width(i, "mlp", "ffn", getattr(config, ffn)[i]) for i in layers)

    # T5: the columns of the table of relative positions that the heads which stay read.
    field = "decoder_position_heads" if decoder else "position_heads"
    columns = getattr(config, field)
    if config.relative_buckets and (columns or any(kept_in(i, "attention") for i in layers)):
        columns = columns or tuple(tuple(range(n)) for n in heads)
        changes[field] = tuple(
            tuple(np.array(columns[i])[kept_in(i, "attention").get("kv_heads", slice(None))].tolist()) for i in layers
        )
    return changes
