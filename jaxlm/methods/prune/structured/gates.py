"""Gates: where they sit, which of their entries close, and the surgery and the method that close and remove them."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import (
    Adapted,
    Axes,
    FakeQuant,
    Gate,
    Method,
    Node,
    Step,
    Switch,
    Tree,
    canonical_path,
    flatten,
    unflatten,
)
from jaxlm.methods.prune.schedule import check_schedule, cubic, overdue
from jaxlm.methods.prune.structured.scores import Calibration, Loss, magnitude_of, scores_of
from jaxlm.methods.prune.structured.shrink import shrink

PLACES = {
    "heads": r"((?:.*/)?layers_\d+/(?:cross_)?attention)/gate",
    "ffn": r"((?:.*/)?layers_\d+/mlp)/gate",
    "layers": r"((?:.*/)?layers_\d+)/gate",
    "hidden": r"(hidden)",
}
"""Where the gates of each kind sit. `queries` gates sit where those of `heads` do."""
BUDGETS = ("uniform", "global")


def open_gates(
    model: Any, params: Tree, axes: Mapping[str, Axes], kinds: Collection[str], make: Callable[..., Switch] = Gate
) -> tuple[dict[str, Any], dict[str, Axes]]:
    """Adds an open gate for every kind: `(params, axes)`, canonical view.

    Args:
      kinds: of `heads` (KV groups; the query heads of a single group, MQA), `queries` (the query heads of every KV
        group, instead of `heads`), `ffn` (units), `hidden` (the residual stream), `layers`.
      make: from the shape's ones to a switch.

    Raises:
      ValueError: for a weight in training with rounding (its scales span what would be removed), or for a kind that
        the model has nothing of.
    """
    flat, axes, sizes = flatten(params), dict(axes), model.sizes()
    gates: dict[str, tuple[tuple[int, ...], Axes]] = {}
    for path in list(flat):
        module, _, leaf = path.rpartition("/")
        if leaf != "kernel" or path not in sizes:
            continue
        module, _, product = module.rpartition("/")
        if product == "query" and {"heads", "queries"} & set(kinds):
            groups, each = sizes[path][1][:2]
            apart = each > 1 and (groups == 1 or "queries" in kinds)
            names: Axes = ("kv_heads", "q_per_kv" if apart else None, None)
            if "queries" not in kinds or apart:
                gates[module] = ((groups, each if apart else 1, 1), names)
        elif product == "up" and "ffn" in kinds:
            gates[module] = ((sizes[path][1][0],), ("ffn",))
    if "queries" in kinds and not any(module.endswith("attention") for module in gates):
        raise ValueError("pruning query heads of KV groups: every group has a single one; prune 'heads' instead")
    for module in gates:
        check_exact(flat, f"{module}/")
    if "hidden" in kinds:
        check_exact(flat, "")
    if "layers" in kinds:
        if model.config.layer_map or model.config.decoder_layer_map:
            raise ValueError("pruning layers: they share their parameters; put the surgery unshare first")
        gates |= dict.fromkeys(layer_paths(model.config), ((), ()))
    named = {f"{module}/gate": gate for module, gate in gates.items()}
    if "hidden" in kinds:
        named["hidden"] = ((model.config.hidden_size,), (None,))
    for path, (shape, names) in named.items():
        flat[path], axes[path] = make(jnp.ones(shape)), names
    return unflatten(flat), axes


def layer_paths(config: Any) -> list[str]:
    """Paths of all layers, encoder before decoder."""
    first = "encoder/" if config.encoder_decoder else ""
    return [f"{first}layers_{i}" for i in range(config.num_layers)] + [
        f"decoder/layers_{i}" for i in range(config.num_decoder_layers)
    ]


def check_exact(flat: Mapping[str, Any], below: str) -> None:
    """Raises ValueError for a weight that trains with rounding below a path."""
    for path, leaf in flat.items():
        if path.startswith(below) and rounds(leaf):
            raise ValueError(f"{path} trains with rounding, whose scales span what pruning removes; prune first")


def rounds(leaf: Any) -> bool:
    """Whether a FakeQuant is inside a leaf."""
    inner = getattr(leaf, "base", None)
    return isinstance(leaf, FakeQuant) or (isinstance(inner, Node) and rounds(inner))


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
    found = [kind for kind, pattern in PLACES.items() if re.fullmatch(pattern, canonical_path(path))]
    if not found:
        raise ValueError(f"{path}: no gate of pruning sits there")
    return found[0]


# Which entries close --------------------------------------------------------------------------------------------------


def best(scores: jax.Array, kept: jax.Array | int) -> jax.Array:
    """The mask of the `kept` largest scores along the last axis; of equal ones the later stay.

    >>> best(jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), jnp.array([2, 1])).tolist()
    [[True, False, True], [False, False, True]]
    """
    rank = jnp.argsort(jnp.argsort(scores, axis=-1, stable=True), axis=-1)
    return rank >= scores.shape[-1] - jnp.asarray(kept)[..., None]


def how_many(size: int, share: jax.Array | float, multiple: int = 1) -> jax.Array:
    """What stays of `size` when a share goes: `size - round(share · size)`, up to the next multiple, at least one.

    >>> int(how_many(12, 0.5)), int(how_many(12, 0.5, multiple=8)), int(how_many(12, 0.99))
    (6, 8, 1)
    """
    kept = jnp.maximum(size - jnp.round(jnp.asarray(share) * size).astype(jnp.int32), 1)
    return jnp.minimum(-(-kept // multiple) * multiple, size)


def choose(
    scores: Mapping[str, jax.Array], share: Mapping[str, Any], budget: str = "uniform", multiple: int = 1
) -> dict[str, jax.Array]:
    """Which entries of several gates stay open: bool, in the shapes of the scores.

    `uniform`: each row of scores gives up its own share. `global`: rows are divided by their norm `‖s‖₂` and ranked
    together, so that layers become unequal; each keeps its best. Source: Molchanov et al. 2017, arXiv:1611.06440.

    Args:
      scores: by path, `[..., entries]`; every row is chosen from apart.
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
    open_ = best(together, how_many(together.size, next(iter(share.values()))))
    # As many as would stay of each row, up to the multiple; the best of each row always does.
    chosen, start = {}, 0
    for path, s in safe.items():
        row = open_[start : start + s.size].reshape(s.shape) | jnp.isinf(s)
        start += s.size
        count = jnp.sum(row, axis=-1)
        chosen[path] = best(s, jnp.minimum(-(-count // multiple) * multiple, s.shape[-1]))
    return chosen


def close_gates(
    params: Tree,
    scores: Mapping[str, jax.Array],
    shares: Mapping[str, Any],
    budget: str = "uniform",
    multiple: int = 1,
) -> dict[str, Any]:
    """Sets every gate that has scores, in either view.

    Args:
      scores: by path of the gate, `[..., entries]`.
      shares: what closes of each kind; one number, or (canonical view) one a layer, encoder before decoder.
      multiple: FFN units and stream dimensions are kept in multiples of it.
    """
    flat = flatten(params)
    for kind in PLACES:
        own = {path: s for path, s in scores.items() if kind_of(path) == kind}
        if not own or kind not in shares:
            continue
        step = multiple if kind in ("ffn", "hidden") else 1
        open_ = choose(own, _by_path(own, shares[kind], kind), budget if kind in ("heads", "ffn") else "uniform", step)
        for path, mask in open_.items():
            flat[path] = Gate(mask.astype(jnp.float32).reshape(flat[path].value.shape))
    return unflatten(flat)


def _by_path(scores: Mapping[str, Any], share: Any, kind: str) -> dict[str, Any]:
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
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    *,
    calibrate: Callable[[], Calibration] | None = None,
    loss: Loss | None = None,
    heads: float | tuple[float, ...] = 0.0,
    queries: float | tuple[float, ...] = 0.0,
    ffn: float | tuple[float, ...] = 0.0,
    hidden: float = 0.0,
    score: str = "magnitude",
    budget: str = "uniform",
    multiple: int = 1,
):
    """Surgery: removes the given shares at once.

    Args:
      calibrate, loss: gives calibration data, and the task's loss; for scores that read them.
      heads: share of the heads of every attention; with grouped queries of its KV groups, each with its queries.
      queries: share of the query heads of every KV group (instead of `heads`).
      ffn: share of the units of every FFN. Shares may be tuples, one a layer, encoder before decoder.
      hidden: share of the residual stream's dimensions.
      score: `magnitude`; from calibration data `activation` or `taylor`.
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
        for each in share if isinstance(share, tuple | list) else (share,):
            check_share(kind, each)
    params, axes = open_gates(model, params, axes, {"queries" if queries and k == "heads" else k for k in shares})
    scores = scores_of(score, model, params, axes, calibrate, loss)
    return shrink(model, close_gates(params, scores, shares, budget, multiple), axes)


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
    """Closes the gates of the given shares by magnitude while training goes on, then removes them.

    Shares grow by the cubic schedule from step `begin` to `end`; scores are recomputed every `every` steps, so a unit
    can come back. Baking is `shrink`.

    Args:
      heads, ffn, hidden, budget, multiple: see `prune`.
    """
    shares = {kind: share for kind, share in (("heads", heads), ("ffn", ffn), ("hidden", hidden)) if share}
    for kind, share in shares.items():
        check_share(kind, share)
    if budget not in BUDGETS:
        raise ValueError(f"structured: unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    check_schedule("structured", begin, end, every)
    names: dict[str, Axes] = {}

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        params, axes = open_gates(model, params, axes, shares)
        names.clear()
        names.update(axes)
        return Adapted(params, axes, {}, {"structured": {"renewed": jnp.int32(0)}})

    def update(step: Step, grads: dict, constants: dict, number: jax.Array) -> Step:
        def new() -> Tree:
            now = {kind: cubic(number, share, begin, end) for kind, share in shares.items()}
            return close_gates(step.params, magnitude_of(step.params, names), now, budget, multiple)

        last = step.state["structured"]["renewed"]
        now_due = overdue(number, last, begin, end, every)
        params = jax.lax.cond(now_due, new, lambda: step.params)
        state = {**step.state, "structured": {"renewed": jnp.where(now_due, number, last)}}
        return step._replace(params=params, state=state)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        return shrink(model, params, axes)

    def claims(params: Tree) -> set[tuple[str, str]]:
        return widths(params, shares)

    return Method(init=init, update=update, bake=bake, claims=claims)


def widths(params: Tree, kinds: Collection[str]) -> set[tuple[str, str]]:
    """What gates of the given kinds claim, before they are there: the width (of a layer, its place) of modules."""
    found: set[tuple[str, str]] = {("hidden", "width")} if "hidden" in kinds else set()
    for path in flatten(params):
        layer = re.match(r"((?:.*/)?layers_\d+)/((?:cross_)?attention|mlp)/", path)
        if layer is None:
            continue
        if ("ffn" if layer[2] == "mlp" else "heads") in kinds:
            found.add((f"{layer[1]}/{layer[2]}", "width"))
        if "layers" in kinds:
            found.add((layer[1], "place"))
    return found


def check_share(kind: str, share: float) -> None:
    """Raises ValueError for a share that is none, or that leaves nothing."""
    if not 0 <= share < 1 or math.isnan(share):
        raise ValueError(f"structured pruning: the share of {kind} must be in [0, 1), not {share}")
