"""A stack of layers, and its two views.

The *canonical* view holds one subtree per layer: `layers_0`, `layers_1`, … Training holds the *run view*: consecutive
layers of equal structure are one segment, `layers_0-11`, every array with a leading `layers` axis, so that the forward
pass scans, the optimizer updates few arrays and compile time does not grow with depth. A model whose layers differ in
size has several segments.
"""

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import PRODUCT, SEGMENT, Context, Tap, lookup
from jaxlm.nn.block import BlockInputs, block
from jaxlm.nn.layer import Layer

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
"""What a layer keeps for the backward pass: everything, its input only, or the results of products and of attention."""


def run_view(params: Mapping[str, Any], kind: Callable[[str], Hashable], prefix: str = "") -> dict[str, Any]:
    """Stacks consecutive layers whose trees, shapes, dtypes and `kind(path of the layer)` are equal."""
    tree = {
        key: run_view(value, kind, f"{prefix}{key}/") if isinstance(value, Mapping) else value
        for key, value in params.items()
        if _layer_number(key) is None
    }
    numbers = sorted(n for key in params if (n := _layer_number(key)) is not None)
    kinds = {n: (_structure(params[f"layers_{n}"]), kind(f"{prefix}layers_{n}")) for n in numbers}
    groups: list[list[int]] = []
    for n in numbers:
        if groups and kinds[n] == kinds[groups[-1][-1]]:
            groups[-1].append(n)
        else:
            groups.append([n])
    for group in groups:
        layers = [params[f"layers_{n}"] for n in group]
        tree[f"layers_{group[0]}-{group[-1]}"] = jax.tree.map(lambda *leaves: _stack(leaves), *layers)
    return tree


def canonical_view(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `run_view`; a tree in the canonical view is returned unchanged."""
    tree: dict[str, Any] = {}
    for key, value in params.items():
        segment = re.fullmatch(SEGMENT, key)
        if segment is not None:
            for i, layer in enumerate(_unstack(value, int(key.split("-")[1]) + 1 - int(segment[1]))):
                tree[f"layers_{int(segment[1]) + i}"] = layer
        else:
            tree[key] = canonical_view(value) if isinstance(value, Mapping) else value
    return tree


def _layer_number(key: str) -> int | None:
    match = re.fullmatch(r"layers_(\d+)", key)
    return int(match[1]) if match else None


def _structure(tree: Any) -> Hashable:
    return jax.tree.structure(tree), tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def _stack(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _unstack(stacked: Any, count: int) -> list[Any]:
    """The subtrees of a segment's `count` layers."""
    leaves, structure = jax.tree.flatten(stacked)
    on_device = leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    layers = _unstack_arrays(leaves) if on_device else [[_index(leaf, i) for leaf in leaves] for i in range(count)]
    return [jax.tree.unflatten(structure, layer) for layer in layers]


@jax.jit
def _unstack_arrays(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """`[layer][leaf]` of stacked arrays, in one program: indexed one by one, every array would be compiled for."""
    return [[jax.lax.index_in_dim(leaf, i, keepdims=False) for leaf in leaves] for i in range(len(leaves[0]))]


def _index(leaf: Any, i: int) -> Any:
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
    entries = []
    for key in params:
        match = re.fullmatch(r"layers_(\d+)(?:-(\d+))?", key)
        if match:
            first = int(match[1])
            entries.append(Segment(key, first, int(match[2]) - first + 1 if match[2] else None))
    return sorted(entries, key=lambda s: s.first)


class Run(NamedTuple):
    """Consecutive layers of a stack that are one scan, or one layer that is called by itself.

    Attributes:
      name: `layers_4-7`, or `layers_4` of a single layer: numbers in the stack, and the key of their cache.
      first: number of the first layer in the stack; length: number of layers (`None`: one, not stacked).
      key: of their parameters; rows: row of every layer in the stacked parameters, `None` for 0, 1, 2, …
    """

    name: str
    first: int
    length: int | None
    key: str
    rows: tuple[int, ...] | None = None


def runs(params: Mapping[str, Any], layers: tuple[Layer, ...], layer_map: tuple[int, ...] | None = None) -> list[Run]:
    """The layers of a stack in the order of their application, in either view.

    Without a map these are the segments. With one (`layer_map[i]` is the number of the stored layer that layer i uses),
    consecutive layers with parameters in one segment and of equal structure are one run, in any order of the rows.
    """
    stored = segments(params)
    if layer_map is None:
        return [Run(s.key, s.first, s.length, s.key) for s in stored]
    segment_of = {n: s for s in stored for n in range(s.first, s.first + (s.length or 1))}
    groups: list[list[int]] = []
    for i, n in enumerate(layer_map):
        joins = (
            bool(groups)
            and segment_of[n].length is not None
            and segment_of[n] == segment_of[layer_map[groups[-1][-1]]]
            and layers[i] == layers[groups[-1][0]]
        )
        if joins:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_run_of(group, segment_of[layer_map[group[0]]], layer_map) for group in groups]


def _run_of(group: list[int], segment: Segment, layer_map: tuple[int, ...]) -> Run:
    """The run of consecutive layers whose parameters are stored in one segment."""
    first, last = group[0], group[-1]
    if segment.length is None:
        return Run(f"layers_{first}", first, None, segment.key)
    rows = tuple(layer_map[i] - segment.first for i in group)
    in_order = rows == tuple(range(segment.length))
    return Run(f"layers_{first}-{last}", first, len(group), segment.key, None if in_order else rows)


def stack(
    params: Mapping[str, Any],
    x: jax.Array,
    layers: tuple[Layer, ...],
    inputs: BlockInputs,
    layer_map: tuple[int, ...] | None = None,
    *,
    cache: Mapping[str, Any] | None = None,
    ctx: Context,
    taps: Collection[Tap] = (),
    remat: str = "none",
) -> tuple[jax.Array, dict[Tap, jax.Array], dict[str, Any]]:
    """Applies all layers to `x [batch, length, hidden]`, in either view.

    Layers that share parameters (`layer_map`) still differ in their dropout keys and in their caches.

    Returns:
      the residual stream, the tapped activations, and the updated cache (by names of the runs).
    """
    policy = lookup(REMAT, remat, "remat policy")
    tapped = {tap: x for tap in taps if tap == Tap("hidden", 0)}
    new_cache: dict[str, Any] = {}
    for run in runs(params, layers, layer_map):
        # The taps in this run; the stream after its last layer is its result, so that need not leave the scan.
        numbers = range(run.first, run.first + (run.length or 1))
        run_taps = {t for t in taps if (t.depth - 1 if t.site == "hidden" else t.depth) in numbers}
        sites = {t.site for t in run_taps if t != Tap("hidden", numbers.stop)}
        run_params, layer_params = params[run.key], _layer_params(params[run.key], run)

        def layer_step(x, scanned, layer=layers[run.first], sites=sites, layer_params=layer_params):
            entry, number, layer_cache = scanned
            out = block(layer_params(entry), x, layer, inputs, layer_cache, ctx.at(number), taps=sites)
            return out.x, (out.taps, out.cache)

        if policy is not None:
            # With its barrier (prevent_cse) in a scan too: without it XLA widens what is kept before the loop begins.
            layer_step = jax.checkpoint(layer_step, policy=policy)
        # One layer is called; stacked ones are scanned, by their parameters or by the rows that they share.
        run_cache = None if cache is None else cache[run.name]
        if run.length is None:
            x, (activations, run_cache) = layer_step(x, (run_params, run.first, run_cache))
            activations = {site: value[None] for site, value in activations.items()}
        else:
            counter = jnp.arange(numbers.start, numbers.stop)
            entries = run_params if run.rows is None else jnp.array(run.rows)
            x, (activations, run_cache) = jax.lax.scan(layer_step, x, (entries, counter, run_cache))
        new_cache[run.name] = run_cache
        for tap in run_taps:
            row = tap.depth - run.first - (tap.site == "hidden")
            tapped[tap] = x if tap == Tap("hidden", numbers.stop) else activations[tap.site][row]
    return x, tapped, new_cache


def _layer_params(stacked: Any, run: Run) -> Callable[[Any], Any]:
    """The parameters of a layer from its entry in the scan: the parameters themselves, or a row of `stacked`."""
    rows = run.rows
    if rows is None:
        return lambda entry: entry
    if len(set(rows)) == 1:  # every layer has the same row, so the stack is not indexed again in every one
        shared = jax.tree.map(lambda leaf: leaf[rows[0]], stacked)
        return lambda row: shared
    return lambda row: jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), stacked)
