"""Gates: where they sit, which of their entries close, and the surgery and the method that close and remove them."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import (
    LM,
    NO_DATA,
    Axes,
    FakeQuant,
    Gate,
    Method,
    MethodInit,
    Node,
    Step,
    SurgeryContext,
    Switch,
    Tree,
    canonical_path,
    flatten,
    unflatten,
)
from jaxlm.methods.prune.schedule import check_schedule, cubic, overdue
from jaxlm.methods.prune.structured.scores import magnitude_of, scores_of
from jaxlm.methods.prune.structured.shrink import shrink

GATE_PATHS = {
    "heads": r"((?:.*/)?layers_\d+/(?:cross_)?attention)/gate",
    "ffn": r"((?:.*/)?layers_\d+/mlp)/gate",
    "layers": r"((?:.*/)?layers_\d+)/gate",
    "hidden": r"(hidden)",
}
"""Paths of the gates of each kind, in either view. `queries` gates sit where those of `heads` do."""
BUDGETS = ("uniform", "global")


def open_gates(lm: LM, kinds: Collection[str], make: Callable[..., Switch] = Gate) -> LM:
    """The model with an open gate for every kind.

    Args:
      kinds: of `heads` (KV groups; the query heads of a single group, MQA), `queries` (the query heads of every KV
        group, instead of `heads`), `ffn` (units), `hidden` (the residual stream), `layers`.
      make: from the shape's ones to a switch.

    Raises:
      ValueError: for a weight in quantization-aware training (its scales span what would be removed), or for a kind
        that the model has nothing of.
    """
    flat, axes, sizes = flatten(lm.params), dict(lm.axes), lm.network.sizes()

    # Gates of modules: of the heads where there is a query, of the units where there is an `up`.
    gates: dict[str, tuple[tuple[int, ...], Axes]] = {}
    for path in list(flat):
        module, _, leaf = path.rpartition("/")
        if leaf != "kernel" or path not in sizes:
            continue
        module, _, product = module.rpartition("/")
        if product == "query" and {"heads", "queries"} & set(kinds):
            groups, queries = sizes[path][1][:2]
            by_query = queries > 1 and (groups == 1 or "queries" in kinds)
            names: Axes = ("kv_heads", "q_per_kv" if by_query else None, None)
            if "queries" not in kinds or by_query:
                gates[module] = ((groups, queries if by_query else 1, 1), names)
        elif product == "up" and "ffn" in kinds:
            gates[module] = ((sizes[path][1][0],), ("ffn",))
    if "queries" in kinds and not any(module.endswith("attention") for module in gates):
        raise ValueError("pruning query heads of KV groups: every group has a single one; prune 'heads' instead")
    for module in gates:
        check_exact(flat, f"{module}/")
    if "hidden" in kinds:
        check_exact(flat, "")

    # Gates of whole layers, and of the stream.
    if "layers" in kinds:
        if lm.config.layer_map or lm.config.decoder_layer_map:
            raise ValueError("pruning layers: they share their parameters; put the surgery unshare first")
        gates |= dict.fromkeys(layer_paths(lm.config), ((), ()))
    named = {f"{module}/gate": gate for module, gate in gates.items()}
    if "hidden" in kinds:
        named["hidden"] = ((lm.config.hidden_size,), (None,))

    for path, (shape, names) in named.items():
        flat[path], axes[path] = make(jnp.ones(shape)), names
    return lm.replace(params=unflatten(flat), axes=axes)


def layer_paths(config: Any) -> list[str]:
    """Paths of all layers, encoder before decoder."""
    first = "encoder/" if config.encoder_decoder else ""
    return [f"{first}layers_{i}" for i in range(config.num_layers)] + [
        f"decoder/layers_{i}" for i in range(config.num_decoder_layers)
    ]


def check_exact(flat: Mapping[str, Any], below: str) -> None:
    """Raises ValueError for a weight in quantization-aware training below a path."""
    for path, leaf in flat.items():
        if path.startswith(below) and has_fake_quant(leaf):
            raise ValueError(f"{path} is in quantization-aware training: pruning would change its scales; prune first")


def has_fake_quant(leaf: Any) -> bool:
    """Whether a FakeQuant is inside a leaf."""
    inner = getattr(leaf, "base", None)
    return isinstance(leaf, FakeQuant) or (isinstance(inner, Node) and has_fake_quant(inner))


def switches(params: Tree) -> Iterator[tuple[str, str, Any]]:
    """`(path, kind, switch)` of every gate, in either view."""
    for path, leaf in flatten(params).items():
        if isinstance(leaf, Switch):
            yield path, kind_of(path), leaf


def kind_of(path: str) -> str:
    """`heads`, `ffn`, `layers` or `hidden`, for the path of a gate in either view.

    >>> kind_of("decoder/layers_0-3/cross_attention/gate"), kind_of("layers_7/gate")
    ('heads', 'layers')
    """
    kinds = [kind for kind, pattern in GATE_PATHS.items() if re.fullmatch(pattern, canonical_path(path))]
    if not kinds:
        raise ValueError(f"{path}: no gate of pruning sits there")
    return kinds[0]


# Which entries close --------------------------------------------------------------------------------------------------


def best(scores: Float[Array, "*rows entries"], kept: Int[Array, "*rows"]) -> Bool[Array, "*rows entries"]:
    """The mask of the `kept` largest scores along the last axis; of equal ones the later stay.

    >>> best(jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), jnp.array([2, 1])).tolist()
    [[True, False, True], [False, False, True]]
    """
    rank = jnp.argsort(jnp.argsort(scores, axis=-1, stable=True), axis=-1)
    return rank >= scores.shape[-1] - jnp.asarray(kept)[..., None]


def how_many(size: int, share: float | Float[Array, ""], multiple: int = 1) -> Int[Array, ""]:
    """What stays of `size` when a share goes: `size - round(share · size)`, up to the next multiple, at least one.

    >>> int(how_many(12, 0.5)), int(how_many(12, 0.5, multiple=8)), int(how_many(12, 0.99))
    (6, 8, 1)
    """
    kept = jnp.maximum(size - jnp.round(jnp.asarray(share) * size).astype(jnp.int32), 1)
    return jnp.minimum(-(-kept // multiple) * multiple, size)


def choose(
    scores: Mapping[str, Float[Array, "*_ _"]], share: Mapping[str, Any], budget: str = "uniform", multiple: int = 1
) -> dict[str, Bool[Array, "*_ _"]]:
    """Which entries of several gates stay open, in the shapes of the scores.

    `uniform`: each row of scores gives up its own share. `global`: rows are divided by their norm `‖s‖₂` and ranked
    together, so that layers become unequal; each keeps its best. Source: Molchanov et al. 2017, arXiv:1611.06440.

    Args:
      scores: by path, `[*rows, entries]`; every row is chosen from apart.
      share: of the entries that close, by path; for `global` the same everywhere.
      multiple: rows keep a multiple of so many entries.

    >>> {k: v.tolist() for k, v in choose({"a": jnp.array([1., 9., 9.]), "b": jnp.array([1., 1., 9.])},
    ...                                   {"a": 0.5, "b": 0.5}, "global").items()}
    {'a': [False, True, True], 'b': [False, False, True]}
    """
    if budget == "uniform":
        return {
            path: best(s, jnp.broadcast_to(how_many(s.shape[-1], share[path], multiple), s.shape[:-1]))
            for path, s in scores.items()
        }
    normed = {path: s / jnp.maximum(jnp.linalg.norm(s, axis=-1, keepdims=True), 1e-30) for path, s in scores.items()}
    safe = {path: jnp.where(best(s, jnp.ones(s.shape[:-1], int)), jnp.inf, s) for path, s in normed.items()}
    together = jnp.concatenate([s.reshape(-1) for s in safe.values()])
    is_open = best(together, how_many(together.size, next(iter(share.values()))))
    # As many as would stay of each row, up to the multiple; the best of each row always does.
    chosen, start = {}, 0
    for path, s in safe.items():
        open_in_row = is_open[start : start + s.size].reshape(s.shape) | jnp.isinf(s)
        start += s.size
        count = jnp.sum(open_in_row, axis=-1)
        chosen[path] = best(s, jnp.minimum(-(-count // multiple) * multiple, s.shape[-1]))
    return chosen


def close_gates(
    params: Tree,
    scores: Mapping[str, Float[Array, "*_ _"]],
    shares: Mapping[str, Any],
    budget: str = "uniform",
    multiple: int = 1,
) -> dict[str, Any]:
    """Sets every gate that has scores, in either view.

    Args:
      scores: by path of the gate, `[*rows, entries]`.
      shares: what closes of each kind; one number, or (canonical view) one a layer, encoder before decoder.
      multiple: FFN units and stream dimensions are kept in multiples of it.
    """
    flat = flatten(params)
    for kind in GATE_PATHS:
        of_kind = {path: s for path, s in scores.items() if kind_of(path) == kind}
        if not of_kind or kind not in shares:
            continue
        masks = choose(
            of_kind,
            _share_by_path(of_kind, shares[kind], kind),
            budget=budget if kind in ("heads", "ffn") else "uniform",
            multiple=multiple if kind in ("ffn", "hidden") else 1,
        )
        for path, mask in masks.items():
            flat[path] = Gate(mask.astype(jnp.float32).reshape(flat[path].value.shape))
    return unflatten(flat)


def _share_by_path(scores: Mapping[str, Any], share: Any, kind: str) -> dict[str, Any]:
    """The share of every gate: that of its layer, where there is one a layer."""
    if not isinstance(share, tuple | list):
        return dict.fromkeys(scores, share)
    layers = list(dict.fromkeys(re.sub(r"(layers_\d+)/.*", r"\1", path) for path in scores))
    if len(share) != len(layers):
        raise ValueError(f"pruning lists {len(share)} shares of {kind} for {len(layers)} layers")
    by_layer = dict(zip(layers, share, strict=True))
    return {path: by_layer[re.sub(r"(layers_\d+)/.*", r"\1", path)] for path in scores}


# Surgery and method ---------------------------------------------------------------------------------------------------


def prune(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    heads: float | tuple[float, ...] = 0.0,
    queries: float | tuple[float, ...] = 0.0,
    ffn: float | tuple[float, ...] = 0.0,
    hidden: float = 0.0,
    score: str = "magnitude",
    budget: str = "uniform",
    multiple: int = 1,
) -> LM:
    """Surgery: removes shares of heads, units and stream dimensions at once.

    Source: Michel et al. 2019, arXiv:1905.10650 (heads); Molchanov et al. 2017, arXiv:1611.06440 (`taylor`);
    Muralidharan et al. 2024, Minitron, arXiv:2407.14679 (`activation`).

    When: batches and single requests must both become faster. Take `score="taylor"` where there is calibration data,
    and distil afterwards.

    Args:
      heads: share of the heads of every attention; with grouped queries of its KV groups, each with its queries.
      queries: share of the query heads of every KV group (instead of `heads`).
      ffn: share of the units of every FFN. Shares may be tuples, one a layer, encoder before decoder.
      hidden: share of the residual stream's dimensions.
      score: `magnitude`; from calibration data `activation`, or with the task's loss `taylor`.
      budget: `uniform`, or `global`: heads of all layers are ranked together, and so are units.
      multiple: units and dimensions are kept in multiples of it, which hardware (and transformers) like.

    Raises:
      ValueError: a share outside [0, 1), heads and queries at once, or a score from data without calibration.
    """
    shares = {"heads": queries or heads, "ffn": ffn, "hidden": hidden}
    if heads and queries:
        raise ValueError("prune: heads and queries at once; use two entries, one after the other")
    if budget not in BUDGETS:
        raise ValueError(f"prune: unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    if budget == "global" and (queries or any(isinstance(share, tuple | list) for share in shares.values())):
        raise ValueError("prune: a global budget is one share; queries, and shares a layer, need budget='uniform'")
    if multiple < 1:
        raise ValueError(f"prune: multiple must be at least 1, not {multiple}")
    shares = {kind: share for kind, share in shares.items() if share != 0.0}
    for kind, share in shares.items():
        for number in share if isinstance(share, tuple | list) else (share,):
            check_share(kind, number)
    gated = open_gates(lm, {"queries" if queries and kind == "heads" else kind for kind in shares})
    scores = scores_of(score, gated, context)
    return shrink(gated.replace(params=close_gates(gated.params, scores, shares, budget, multiple)))


class AxisNames(struct.PyTreeNode):
    """Axis names of parameters as a constant of the step, in which they are static.

    Attributes:
      items: `(canonical path, axis names)` of every parameter. Static.
    """

    items: tuple[tuple[str, Axes], ...] = struct.field(pytree_node=False)


def structured(
    *,
    heads: float = 0.0,
    ffn: float = 0.0,
    hidden: float = 0.0,
    budget: str = "uniform",
    multiple: int = 1,
    begin: int = 0,
    end: int,
    every: int = 10,
) -> Method:
    """Closes shares of the gates by magnitude while training goes on, then removes them.

    Shares grow by the cubic schedule from step `begin` to `end`; scores are recomputed every `every` steps, so a unit
    can come back. Baking is `shrink`.

    Source: the cubic schedule of Zhu and Gupta 2017, arXiv:1710.01878, over heads (Michel et al. 2019,
    arXiv:1905.10650) and units.

    When: the model must become faster and there is a training run anyway: gates that close in it may open again.
    Cutting with `prune` before the same training did as well.

    Args:
      heads, ffn, hidden, budget, multiple: see `prune`.
      begin, end: first and last step of the schedule, equal for one-shot; every: steps between two new choices.
    """
    shares = {kind: share for kind, share in (("heads", heads), ("ffn", ffn), ("hidden", hidden)) if share}
    for kind, share in shares.items():
        check_share(kind, share)
    if budget not in BUDGETS:
        raise ValueError(f"structured: unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    check_schedule("structured", begin, end, every)

    def init(key: jax.Array, lm: LM) -> MethodInit:
        lm = open_gates(lm, shares)
        names = AxisNames(tuple(lm.axes.items()))
        return MethodInit(lm, constants={"structured": names}, state={"structured": {"renewed": jnp.int32(0)}})

    def update(step: Step, grads: dict, constants: dict, number: Int[Array, ""]) -> Step:
        def closed() -> Tree:
            scores = magnitude_of(step.params, dict(constants["structured"].items))
            shares_of_step = {kind: cubic(number, share, begin, end) for kind, share in shares.items()}
            return close_gates(step.params, scores, shares_of_step, budget, multiple)

        last = step.state["structured"]["renewed"]
        due = overdue(number, last, begin, end, every)
        params = jax.lax.cond(due, closed, lambda: step.params)
        state = {**step.state, "structured": {"renewed": jnp.where(due, number, last)}}
        return step._replace(params=params, state=state)

    def bake(lm: LM, state: dict[str, Any]) -> LM:
        return shrink(lm)

    def claims(params: Tree) -> set[tuple[str, str]]:
        return widths(params, shares)

    return Method(init=init, update=update, bake=bake, claims=claims)


def widths(params: Tree, kinds: Collection[str]) -> set[tuple[str, str]]:
    """What gates of these kinds will claim: the width of modules, and of a layer its place."""
    claims: set[tuple[str, str]] = {("hidden", "width")} if "hidden" in kinds else set()
    for path in flatten(params):
        layer = re.match(r"((?:.*/)?layers_\d+)/((?:cross_)?attention|mlp)/", path)
        if layer is None:
            continue
        if ("ffn" if layer[2] == "mlp" else "heads") in kinds:
            claims.add((f"{layer[1]}/{layer[2]}", "width"))
        if "layers" in kinds:
            claims.add((layer[1], "place"))
    return claims


def check_share(kind: str, share: float) -> None:
    """Raises ValueError for a share that is none, or that leaves nothing."""
    if not 0 <= share < 1 or math.isnan(share):
        raise ValueError(f"structured pruning: the share of {kind} must be in [0, 1), not {share}")
