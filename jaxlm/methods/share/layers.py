"""Sharing: several layers with one set of parameters, as ALBERT has them."""

import re
from typing import Any

import jax.numpy as jnp

from jaxlm.core import Axes, Node, Tree, flatten, unflatten

HOW = ("average", "first")


def share(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    *,
    layer_map: tuple[int, ...] | None = None,
    decoder_layer_map: tuple[int, ...] | None = None,
    how: str = "average",
):
    """Surgery: layers of the same number in `layer_map` become one, which the stack applies in all their places.

    Bytes and optimizer state shrink; the computation does not. Source: Lan et al. 2019, ALBERT, arXiv:1909.11942.

    Args:
      model, params, axes: the model, canonical view, no layer shared yet.
      layer_map: for every layer the stored layer that it becomes, from 0 without gaps: `(0,) * 12` shares all of
        twelve, `(0, 0, 1, 1)` repeats, `(0, 1, 0, 1)` cycles, `(0, 1, 1, 0)` goes back.
      decoder_layer_map: the same for the decoder of an encoder-decoder.
      how: a stored layer begins as the `average` of its layers, or as the `first` of them.

    Returns:
      `(model, params, axes)` with fewer layers in the tree.

    Raises:
      ValueError: for layers of unequal size, or an average of what is no array.
    """
    if how not in HOW:
        raise ValueError(f"share: how must be {' or '.join(map(repr, HOW))}, not {how!r}")
    if layer_map is None and decoder_layer_map is None:
        raise ValueError("share needs layer_map, a stored layer for every layer: (0, 0, 1, 1)")
    config = model.config
    if config.layer_map or config.decoder_layer_map:
        raise ValueError("share: layers are shared already; the surgery unshare gives each its own again")
    config = config.replace(layer_map=layer_map, decoder_layer_map=decoder_layer_map)
    maps = {"encoder/" if config.encoder_decoder else "": config.layer_map, "decoder/": config.decoder_layer_map}
    flat, new, names = flatten(params), dict[str, Any](), dict[str, Axes]()
    for path in flat:
        found = re.fullmatch(r"((?:encoder/|decoder/)?)layers_(\d+)/(.*)", path)
        shared = maps.get(found[1]) if found else None
        if found is None or shared is None:
            new[path], names[path] = flat[path], axes[path]
            continue
        owner = shared[int(found[2])]
        members = [f"{found[1]}layers_{i}/{found[3]}" for i, n in enumerate(shared) if n == owner]
        if path == members[0]:
            target = f"{found[1]}layers_{owner}/{found[3]}"
            new[target] = flat[path] if how == "first" else _mean(members, flat)
            names[target] = axes[path]
    return model.replace(config=config), unflatten(new), names


def unshare(model: Any, params: Tree, axes: dict[str, Axes]):
    """Surgery: every layer its own parameters again, equal at first; so transformers can express the model."""
    config = model.config
    if not (config.layer_map or config.decoder_layer_map):
        raise ValueError("unshare: no layers are shared")
    own, names = model.unshared(params), model.unshared(unflatten(axes))
    return model.replace(config=config.replace(layer_map=None, decoder_layer_map=None)), own, flatten(names)


def _mean(paths: list[str], flat: dict[str, Any]) -> Any:
    """Mean of several leaves, in float32."""
    for path in paths:
        if path not in flat:
            raise ValueError(f"share: {paths[0]} has no counterpart {path}; the layers differ in what they hold")
        if isinstance(flat[path], Node) and len(paths) > 1:
            kind = type(flat[path]).__name__
            raise ValueError(f"share: {path} is a {kind}, which has no average; bake it first, or share how='first'")
    if len(paths) == 1:
        return flat[paths[0]]
    total = sum(flat[path].astype(jnp.float32) for path in paths)
    return (total / len(paths)).astype(flat[paths[0]].dtype)
