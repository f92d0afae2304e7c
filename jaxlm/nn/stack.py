"""A stack of layers, and its two views.

The *canonical* view holds one subtree a layer: `layers_0`, `layers_1`, … A run holds the *run view*: consecutive layers
of equal structure are one segment, `layers_0-11`, every array with a leading `layers` axis, so that the forward pass
scans, the optimizer meets few arrays and compile time does not grow with depth. Ragged models become several segments.
"""

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import PRODUCT, SEGMENT, Context, Tap, lookup
from jaxlm.nn.block import Surroundings, block
from jaxlm.nn.layer import Layer

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
"""What a layer keeps for its backward pass: everything, its input only, or the results of products and of attention."""


def run_view(params: Mapping[str, Any], kind: Callable[[str], Hashable], prefix: str = "") -> dict[str, Any]:
    """Stacks consecutive layers whose trees, shapes, dtypes and `kind(path of the layer)` are equal."""
    tree = {
        key: run_view(value, kind, f"{prefix}{key}/") if isinstance(value, Mapping) else value
        for key, value in params.items()
        if _layer(key) is None
    }
    numbers = sorted(n for key in params if (n := _layer(key)) is not None)
    segments: list[list[int]] = []
    last = None
    for n in numbers:
        this = (_structure(params[f"layers_{n}"]), kind(f"{prefix}layers_{n}"))
        if segments and this == last:
            segments[-1].append(n)
        else:
            segments.append([n])
        last = this
    for members in segments:
        layers = [params[f"layers_{n}"] for n in members]
        tree[f"layers_{members[0]}-{members[-1]}"] = jax.tree.map(lambda *leaves: _stack(leaves), *layers)
    return tree


def canonical_view(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `run_view`; a canonical tree passes unchanged."""
    tree: dict[str, Any] = {}
    for key, value in params.items():
        segment = re.fullmatch(SEGMENT, key)
        if segment is not None:
            for i, layer in enumerate(_layers(value, int(key.split("-")[1]) + 1 - int(segment[1]))):
                tree[f"layers_{int(segment[1]) + i}"] = layer
        else:
            tree[key] = canonical_view(value) if isinstance(value, Mapping) else value
    return tree


def _layer(key: str) -> int | None:
    found = re.fullmatch(r"layers_(\d+)", key)
    return int(found[1]) if found else None


def _structure(tree: Any) -> Hashable:
    return jax.tree.structure(tree), tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def _stack(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _layers(stacked: Any, count: int) -> list[Any]:
    """The subtrees of a segment's layers."""
    leaves, structure = jax.tree.flatten(stacked)
    whole = leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    rows = _rows(leaves) if whole else [[_take(leaf, i) for leaf in leaves] for i in range(count)]
    return [jax.tree.unflatten(structure, row) for row in rows]


@jax.jit
def _rows(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """Layer by layer the rows of stacked arrays, in one program: by themselves each of them would be compiled."""
    return [[jax.lax.index_in_dim(leaf, i, keepdims=False) for leaf in leaves] for i in range(len(leaves[0]))]


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]


class Segment(NamedTuple):
    """One entry of a stack: its key, its first layer, and how many layers are stacked (`None`: one, unstacked)."""

    key: str
    first: int
    length: int | None


def segments(params: Mapping[str, Any]) -> list[Segment]:
    """The layers of a stack in either view, in order of number (`layers_10` follows `layers_9`)."""
    found = []
    for key in params:
        match = re.fullmatch(r"layers_(\d+)(?:-(\d+))?", key)
        if match:
            first = int(match[1])
            found.append(Segment(key, first, int(match[2]) - first + 1 if match[2] else None))
    return sorted(found, key=lambda s: s.first)


class Run(NamedTuple):
    """Consecutive layers of a stack that are one scan, or one layer that is called alone.

    Attributes:
      name: `layers_4-7`, or `layers_4` of one alone: by numbers in the stack, as their cache is named.
      first: number in the stack; length: how many (`None`: one, whose parameters are not stacked).
      key: of the parameters; rows: which of the layers stacked there each one is, `None` for each in turn.
    """

    name: str
    first: int
    length: int | None
    key: str
    rows: tuple[int, ...] | None = None


def runs(params: Mapping[str, Any], layers: tuple[Layer, ...], layer_map: tuple[int, ...] | None = None) -> list[Run]:
    """The layers of a stack in the order of their application, in either view.

    Without a map those are the segments. With one (`layer_map[i]` is the stored layer that layer i is), layers that
    find their parameters in one segment and have equal structure are one run, in whatever order they come.
    """
    stored = segments(params)
    if layer_map is None:
        return [Run(s.key, s.first, s.length, s.key) for s in stored]
    owner = {n: s for s in stored for n in range(s.first, s.first + (s.length or 1))}
    members: list[list[int]] = []
    for i, n in enumerate(layer_map):
        last = members[-1][-1] if members else None
        alone = owner[n].length is None or last is None or owner[layer_map[last]] != owner[n]
        if alone or layers[i] != layers[members[-1][0]]:
            members.append([i])
        else:
            members[-1].append(i)
    found = []
    for own in members:
        segment = owner[layer_map[own[0]]]
        if segment.length is None:
            found.append(Run(f"layers_{own[0]}", own[0], None, segment.key))
        else:
            rows = tuple(layer_map[i] - segment.first for i in own)
            in_turn = rows == tuple(range(segment.length))
            name = f"layers_{own[0]}-{own[-1]}"
            found.append(Run(name, own[0], len(own), segment.key, None if in_turn else rows))
    return found


def stack(
    params: Mapping[str, Any],
    x: jax.Array,
    layers: tuple[Layer, ...],
    around: Surroundings,
    layer_map: tuple[int, ...] | None = None,
    *,
    cache: Mapping[str, Any] | None = None,
    ctx: Context,
    taps: Collection[Tap] = (),
    remat: str = "none",
) -> tuple[jax.Array, dict[Tap, jax.Array], dict[str, Any]]:
    """All layers on `x [batch, length, hidden]`, in either view.

    Layers that share their parameters (`layer_map`) still have dropout of their own, and each its own cache.

    Returns:
      the residual stream, the tapped activations, and the updated cache (by names of the runs).
    """
    policy = lookup(REMAT, remat, "remat policy")
    tapped = {tap: x for tap in taps if tap == Tap("hidden", 0)}
    new_cache: dict[str, Any] = {}
    for run in runs(params, layers, layer_map):
        numbers = range(run.first, run.first + (run.length or 1))
        inside = {t for t in taps if (t.depth - 1 if t.site == "hidden" else t.depth) in numbers}
        kept_sites = {t.site for t in inside if t != Tap("hidden", numbers.stop)}
        own_params, row = params[run.key], _row_of(params[run.key], run)

        def layer_step(x, inputs, layer=layers[run.first], kept_sites=kept_sites, row=row):
            own, number, own_cache = inputs
            out = block(row(own), x, layer, around, own_cache, ctx.at(number), taps=kept_sites)
            return out.x, (out.taps, out.cache)

        if policy is not None:
            # With its barrier (prevent_cse) in a scan too: without it XLA widens what is kept before the loop begins.
            layer_step = jax.checkpoint(layer_step, policy=policy)
        own_cache = None if cache is None else cache[run.name]
        if run.length is None:
            x, (kept, own_cache) = layer_step(x, (own_params, run.first, own_cache))
            kept = {site: value[None] for site, value in kept.items()}
        else:
            counter = jnp.arange(numbers.start, numbers.stop)
            each = own_params if run.rows is None else jnp.array(run.rows)
            x, (kept, own_cache) = jax.lax.scan(layer_step, x, (each, counter, own_cache))
        new_cache[run.name] = own_cache
        for tap in inside:
            own = tap.depth - run.first - (tap.site == "hidden")
            tapped[tap] = x if tap == Tap("hidden", numbers.stop) else kept[tap.site][own]
    return x, tapped, new_cache


def _row_of(stacked: Any, run: Run) -> Callable[[Any], Any]:
    """From what a scan hands to a layer to its parameters: the parameters, or the number of a row of the stack."""
    rows = run.rows
    if rows is None:
        return lambda own: own
    if len(set(rows)) == 1:  # no choice to make, so the stack is not indexed anew in every layer
        only = jax.tree.map(lambda leaf: leaf[rows[0]], stacked)
        return lambda row: only
    return lambda row: jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), stacked)
