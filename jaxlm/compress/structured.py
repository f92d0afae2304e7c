"""Structured pruning: whole heads, FFN units and layers, closed by gates and then removed for good.

Gates sit in the forward pass at `layers_i/attention/gate`, `layers_i/mlp/gate` and `layers_i/gate`. A gate is 0 or 1;
`shrink` slices every array that carries the gated axis name, so that the smaller model computes what the gated one did.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.compress.patterns import keep_largest
from jaxlm.compress.schedule import check_schedule, cubic, due
from jaxlm.core import (
    Adapted,
    Axes,
    FakeQuant,
    Gate,
    Method,
    Node,
    Step,
    Tree,
    components,
    flatten,
    materialize,
    unflatten,
)
from jaxlm.core.paths import field_of, replace_field

HEADS = r"(.*/)?layers_\d+/(cross_)?attention"
UNITS = r"(.*/)?layers_\d+/mlp"
GATED = ("attention", "cross_attention", "mlp")


class Kept(NamedTuple):
    """What stays of a gated module: the axis that its gate switches, and the open indices."""

    axis: str
    indices: np.ndarray


def gated_axis(kind: str, gate: Gate) -> str:
    """The axis that a gate switches: FFN units, KV groups, or the query heads that share one KV group (MQA)."""
    if kind == "mlp":
        return "ffn"
    groups, heads, _ = gate.value.shape[-3:]
    return "q_per_kv" if groups == 1 and heads > 1 else "kv_heads"


def head_scores(module: Mapping[str, Any], count: int, inputs: tuple[str, ...]) -> jax.Array:
    """Importance of every head of an attention, `[count]`: the product of what goes in and what comes out.

    `(Σ_inputs ‖W‖²)^½ · ‖W_o‖` over the head's columns (rows, for o). The inputs are query, key and value of a KV
    group, or the query alone of one of the heads that share a group.
    """
    inwards = sum(
        jnp.sum(jnp.square(materialize(module[name]["kernel"])).reshape(-1, count, width), axis=(0, 2))
        for name in inputs
        for width in [module[name]["kernel"].shape[-1] // count]
    )
    outwards = jnp.sum(jnp.square(materialize(module["output"]["kernel"])).reshape(count, -1), axis=1)
    return jnp.sqrt(inwards * outwards)


def unit_scores(module: Mapping[str, Any]) -> jax.Array:
    """Importance of every FFN unit, `[ffn]`: norm of its inward columns times norm of its outward row."""
    inwards = sum(
        jnp.sum(jnp.square(materialize(module[name]["kernel"])), axis=0)
        for name in ("gate_proj", "up")
        if name in module
    )
    return jnp.sqrt(inwards * jnp.sum(jnp.square(materialize(module["down"]["kernel"])), axis=1))


def module_gate(module: Mapping[str, Any], kind: str, share: jax.Array | float) -> Gate:
    """The gate that closes the `share` of heads or units with the smallest scores; at least one stays open."""
    gate = module["gate"]
    if kind == "mlp":
        scores = unit_scores(module)
    else:
        shared = gated_axis(kind, gate) == "q_per_kv"
        scores = head_scores(module, gate.value.size, ("query",) if shared else ("query", "key", "value"))
    share = jnp.minimum(share, (scores.size - 1) / scores.size)
    open_ = keep_largest(scores, share).astype(jnp.float32)
    return Gate(open_.reshape(gate.value.shape))


def gated_modules(params: Tree, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`(path, subtree)` of every attention and MLP that has a gate."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            if key in GATED and "gate" in value:
                yield f"{prefix}{key}", value
            else:
                yield from gated_modules(value, f"{prefix}{key}/")


def open_gates(params: Tree, axes: Mapping[str, Axes], sizes: Mapping, heads: bool, ffn: bool):
    """Adds an open gate to every attention (`heads`) and MLP (`ffn`): `(params, axes)`.

    Heads go by KV group; those of a single group (MQA) one by one.

    Raises:
      ValueError: for a weight in training with rounding: its scales span what would be removed.
    """
    flat, axes = flatten(params), dict(axes)
    for path in list(flat):
        module, _, leaf = path.rpartition("/query/kernel" if heads and path.endswith("/query/kernel") else "/up/kernel")
        if leaf or not module:
            continue
        if heads and re.fullmatch(HEADS, module):
            groups, heads_each = sizes[path][1][:2]
            one = groups == 1 and heads_each > 1
            gate = Gate(jnp.ones((1, heads_each, 1) if one else (groups, 1, 1)))
            names: Axes = (None, "q_per_kv", None) if one else ("kv_heads", None, None)
        elif ffn and re.fullmatch(UNITS, module):
            gate, names = Gate(jnp.ones(sizes[path][1][0])), ("ffn",)
        else:
            continue
        flat[f"{module}/gate"], axes[f"{module}/gate"] = gate, names
        for other, weight in flat.items():
            if other.startswith(f"{module}/") and rounds(weight):
                raise ValueError(f"{other} trains with rounding, whose scales span what pruning removes; prune first")
    return unflatten(flat), axes


def rounds(leaf: Any) -> bool:
    """Whether a FakeQuant is inside a leaf."""
    inner = getattr(leaf, "base", None)
    return isinstance(leaf, FakeQuant) or (isinstance(inner, Node) and rounds(inner))


def close_gates(params: Tree, heads: jax.Array | float, ffn: jax.Array | float) -> dict[str, Any]:
    """Sets every gate by the scores of its module, in either view (stacked layers each keep their own share)."""
    flat = flatten(params)
    for path, module in gated_modules(params):
        kind = path.rsplit("/", 1)[-1]
        share = ffn if kind == "mlp" else heads
        stacked = module["up" if kind == "mlp" else "query"]["kernel"].shape
        choose = jax.vmap(module_gate, in_axes=(0, None, None)) if len(stacked) == 3 else module_gate
        flat[f"{path}/gate"] = choose(module, kind, share)
    return unflatten(flat)


def shrink(model: Any, params: Tree, axes: dict[str, Axes], sizes: Mapping[str, Any]):
    """Surgery: removes what closed gates switch off, and the gates.

    Every array under a gated module is sliced along each dimension that carries the gated axis name, compound ones
    included, whatever the family and whatever Weight holds it; layers whose own gate is 0 go, and the rest are
    renumbered. The result computes what the gated model did.

    Args:
      model, params, axes: the model, canonical view; gates must be 0 or 1.
      sizes: sizes of the factors of every dimension by path (`axis_sizes`).

    Returns:
      `(model, params, axes)`, the config's per-layer sizes adjusted.
    """
    flat, axes = flatten(params), dict(axes)
    kept: dict[str, Kept] = {}
    for path, module in gated_modules(params):
        gate = module["gate"]
        indices = np.flatnonzero(_binary(f"{path}/gate", gate).reshape(-1))
        kept[path] = Kept(gated_axis(path.rsplit("/", 1)[-1], gate), indices)
        del flat[f"{path}/gate"], axes[f"{path}/gate"]
    closed = {}
    for path in [path for path in flat if re.fullmatch(r"(.*/)?layers_\d+/gate", path)]:
        closed[path.removesuffix("/gate")] = not _binary(path, flat.pop(path)).all()
        del axes[path]
    for path, leaf in flat.items():
        owner = next((module for module in kept if path.startswith(f"{module}/")), None)
        if owner is not None:
            flat[path] = slice_axis(leaf, axes[path], sizes[path], *kept[owner])
    config = _resized(model.config, kept, closed)
    for path, field in (
        ("decoder/relative_positions/embedding", "decoder_position_heads"),
        (("encoder/" if config.encoder_decoder else "") + "relative_positions/embedding", "position_heads"),
    ):
        if columns := getattr(config, field):
            read = sorted({column for row in columns for column in row})
            flat[path] = slice_axis(flat[path], axes[path], sizes[path], "position_heads", np.array(read))
            config = config.replace(**{field: tuple(tuple(map(read.index, row)) for row in columns)})
    flat, axes = _without_layers(flat, closed), _without_layers(axes, closed)
    return model.replace(config=config), unflatten(flat), axes


def slice_axis(leaf: Any, axes: Axes, sizes: tuple[tuple[int, ...], ...], name: str, kept: np.ndarray) -> Any:
    """`leaf` with only the `kept` indices along the axis `name`, inside a Node in every field that carries it."""
    factors = dict(zip(_names(axes), [s for dim in sizes for s in dim], strict=True))
    for field, part in components(leaf, axes).items():
        array = field_of(leaf, field)
        for dimension, entry in enumerate(part.axes):
            names = entry if isinstance(entry, tuple) else (entry,)
            if name not in names:
                continue
            places = np.arange(array.shape[dimension]).reshape([factors[n] for n in names])
            array = jnp.take(array, places.take(kept, axis=names.index(name)).reshape(-1), axis=dimension)
        leaf = replace_field(leaf, field, array) if isinstance(leaf, Node) else array
    return leaf


def _names(axes: Axes) -> list[str | None]:
    return [name for entry in axes for name in (entry if isinstance(entry, tuple) else (entry,))]


def _binary(path: str, gate: Gate) -> np.ndarray:
    value = np.asarray(gate.value)
    if not np.isin(value, (0.0, 1.0)).all():
        raise ValueError(
            f"{path}: a gate must be 0 or 1 to be removed, found {float(value.min())}..{float(value.max())}"
        )
    return value


def _without_layers(flat: dict[str, Any], closed: Mapping[str, bool]) -> dict[str, Any]:
    """Drops the paths of closed layers and renumbers those that stay."""
    if not any(closed.values()):
        return flat
    kept: dict[str, Any] = {}
    for path, value in flat.items():
        found = re.fullmatch(r"((?:.*/)?)layers_(\d+)(/.*)", path)
        if found:
            stack, number, rest = found[1], int(found[2]), found[3]
            if closed.get(f"{stack}layers_{number}"):
                continue
            number -= sum(closed.get(f"{stack}layers_{n}", False) for n in range(number))
            path = f"{stack}layers_{number}{rest}"
        kept[path] = value
    return kept


def _resized(config: Any, kept: Mapping[str, Kept], closed: Mapping[str, bool]) -> Any:
    """The config with the sizes that remain, for the stack at the root or an encoder and a decoder."""
    changes: dict[str, Any] = {}
    for stack, count, heads, ffn, columns in (
        ("decoder/", "num_decoder_layers", "decoder_num_heads", "decoder_ffn_size", "decoder_position_heads"),
        ("encoder/" if config.encoder_decoder else "", "num_layers", "num_heads", "ffn_size", "position_heads"),
    ):
        layers = range(getattr(config, count))
        stay = [i for i in layers if not closed.get(f"{stack}layers_{i}")]
        if not layers:
            continue
        if not stay:
            raise ValueError(f"every layer of {stack or 'the stack'} is closed; at least one must stay")

        def left(module: str, i: int, axis: str, before: int, stack: str = stack) -> int:
            own = kept.get(f"{stack}layers_{i}/{module}")
            return len(own.indices) if own and own.axis == axis else before

        attention = [f"{stack}layers_{i}/attention" for i in layers]
        if stack == "decoder/":
            crossing = config.cross_num_heads
            changes[heads] = tuple(left("attention", i, "kv_heads", getattr(config, heads)[i]) for i in stay)
            changes["cross_num_heads"] = tuple(left("cross_attention", i, "kv_heads", crossing[i]) for i in stay)
        else:
            shared = [h // max(kv, 1) for h, kv in zip(config.num_heads, config.num_kv_heads, strict=True)]
            groups = {i: left("attention", i, "kv_heads", config.num_kv_heads[i]) for i in stay}
            changes["num_kv_heads"] = tuple(groups.values())
            changes[heads] = tuple(n * left("attention", i, "q_per_kv", shared[i]) for i, n in groups.items())
        changes[ffn] = tuple(left("mlp", i, "ffn", getattr(config, ffn)[i]) for i in stay)
        changes[count] = len(stay)
        if config.relative_buckets and (getattr(config, columns) or any(path in kept for path in attention)):
            table = getattr(config, columns) or tuple(tuple(range(n)) for n in getattr(config, heads))
            changes[columns] = tuple(
                tuple(np.array(table[i])[kept[attention[i]].indices].tolist()) if attention[i] in kept else table[i]
                for i in stay
            )
        if stack != "decoder/" and config.window_from:
            changes["window_from"] = sum(i < config.window_from for i in stay)
    return config.replace(**changes)


def prune(model: Any, params: Tree, axes: dict[str, Axes], *, heads: float = 0.0, ffn: float = 0.0):
    """Surgery: removes the given shares of heads (KV groups) and FFN units of every layer at once, by magnitude."""
    sizes = model.sizes()
    params, axes = open_gates(params, axes, sizes, heads > 0, ffn > 0)
    return shrink(model, close_gates(params, _share("heads", heads), _share("ffn", ffn)), axes, sizes)


def structured(*, heads: float = 0.0, ffn: float = 0.0, begin: int = 0, end: int, every: int = 10) -> Method:
    """Closes the gates of the given shares of heads and FFN units while training goes on, then removes them.

    Shares grow by the cubic schedule from step `begin` to `end`; scores are recomputed every `every` steps, so a unit
    can come back. Baking is `shrink`.
    """
    _share("heads", heads), _share("ffn", ffn)
    check_schedule("structured", begin, end, every)

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        return Adapted(*open_gates(params, axes, model.sizes(), heads > 0, ffn > 0))

    def update(step: Step, grads: dict, constants: dict, number: jax.Array) -> Step:
        new = lambda: close_gates(step.params, cubic(number, heads, begin, end), cubic(number, ffn, begin, end))  # noqa: E731
        return step._replace(params=jax.lax.cond(due(number, begin, end, every), new, lambda: step.params))

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        return shrink(model, params, axes, model.sizes())

    def claims(params: Tree) -> set[tuple[str, str]]:
        modules = {path.rsplit("/", 2)[0] for path in flatten(params)}
        wanted = ([HEADS] if heads else []) + ([UNITS] if ffn else [])
        return {(m, "width") for m in modules if any(re.fullmatch(pattern, m) for pattern in wanted)}

    return Method(init=init, update=update, bake=bake, claims=claims)


def keep_layers(model: Any, params: Tree, axes: dict[str, Axes], *, keep: tuple[int, ...]):
    """Surgery: keeps the listed layers of a single stack, in order (a student of fewer layers starts like this)."""
    if model.config.encoder_decoder:
        raise ValueError("keep_layers: an encoder-decoder has two stacks; close the gates of its layers and shrink")
    flat, axes = flatten(params), dict(axes)
    missing = [i for i in keep if not 0 <= i < model.config.num_layers]
    if missing or not keep:
        raise ValueError(f"keep_layers: layers {missing or 'none'} chosen of 0..{model.config.num_layers - 1}")
    for i in range(model.config.num_layers):
        flat[f"layers_{i}/gate"], axes[f"layers_{i}/gate"] = Gate(jnp.float32(i in keep)), ()
    return shrink(model, unflatten(flat), axes, model.sizes())


def _share(name: str, share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"structured pruning: the share of {name} must be in [0, 1), not {share}")
    return share
