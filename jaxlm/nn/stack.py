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
"""What a layer keeps for its backward pass: everything, its input only, or the results of its dense products."""


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
            first = int(segment[1])
            for n in range(first, int(key.split("-")[1]) + 1):
                tree[f"layers_{n}"] = jax.tree.map(lambda leaf, i=n - first: _take(leaf, i), value)
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


def stack(
    params: Mapping[str, Any],
    x: jax.Array,
    layers: tuple[Layer, ...],
    around: Surroundings,
    *,
    cache: Mapping[str, Any] | None = None,
    ctx: Context,
    taps: Collection[Tap] = (),
    remat: str = "none",
) -> tuple[jax.Array, dict[Tap, jax.Array], dict[str, Any]]:
    """All layers on `x [batch, length, hidden]`, in either view.

    Returns:
      the residual stream, the tapped activations, and the updated cache (keys as in `params`).
    """
    policy = lookup(REMAT, remat, "remat policy")
    tapped = {tap: x for tap in taps if tap == Tap("hidden", 0)}
    new_cache: dict[str, Any] = {}
    for segment in segments(params):
        numbers = range(segment.first, segment.first + (segment.length or 1))
        inside = {t for t in taps if (t.depth - 1 if t.site == "hidden" else t.depth) in numbers}
        kept_sites = {t.site for t in inside if t != Tap("hidden", numbers.stop)}

        def layer_step(x, inputs, layer=layers[segment.first], kept_sites=kept_sites):
            own, number, own_cache = inputs
            out = block(own, x, layer, around, own_cache, ctx.at(number), taps=kept_sites)
            return out.x, (out.taps, out.cache)

        if policy is not None:
            layer_step = jax.checkpoint(layer_step, policy=policy, prevent_cse=segment.length is None)
        own_cache = None if cache is None else cache[segment.key]
        if segment.length is None:
            x, (kept, own_cache) = layer_step(x, (params[segment.key], segment.first, own_cache))
            kept = {site: value[None] for site, value in kept.items()}
        else:
            counter = jnp.arange(numbers.start, numbers.stop)
            x, (kept, own_cache) = jax.lax.scan(layer_step, x, (params[segment.key], counter, own_cache))
        new_cache[segment.key] = own_cache
        for tap in inside:
            own = tap.depth - segment.first - (tap.site == "hidden")
            tapped[tap] = x if tap == Tap("hidden", numbers.stop) else kept[tap.site][own]
    return x, tapped, new_cache
