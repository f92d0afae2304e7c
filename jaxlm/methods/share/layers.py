"""Sharing: several layers with one set of parameters, as ALBERT has them."""

import re
from typing import Any

import jax.numpy as jnp

from jaxlm.core import LM, NO_DATA, Axes, Node, SurgeryContext, flatten, unflatten

HOW = ("average", "first")


def share(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    layer_map: tuple[int, ...] | None = None,
    decoder_layer_map: tuple[int, ...] | None = None,
    how: str = "average",
) -> LM:
    """Surgery: layers of the same number in `layer_map` become one, which the stack applies in all their places.

    Bytes and optimizer state shrink; the computation does not. Source: Lan et al. 2019, ALBERT, arXiv:1909.11942.

    When: fewer layers should be stored and not fewer computed: the file and the optimizer's state shrink, the time
    does not.

    Args:
      layer_map: for every layer the stored layer that it becomes, from 0 without gaps: `(0,) * 12` shares all of
        twelve, `(0, 0, 1, 1)` repeats, `(0, 1, 0, 1)` cycles, `(0, 1, 1, 0)` goes back.
      decoder_layer_map: the same for the decoder of an encoder-decoder.
      how: a stored layer begins as the `average` of its layers, or as the `first` of them.

    Returns:
      the model with fewer layers in the tree.

    Raises:
      ValueError: for layers of unequal size, or an average of what is no array.
    """
    if how not in HOW:
        raise ValueError(f"share: how must be {' or '.join(map(repr, HOW))}, not {how!r}")
    if layer_map is None and decoder_layer_map is None:
        raise ValueError("share needs layer_map, a stored layer for every layer: (0, 0, 1, 1)")
    config = lm.config
    if config.layer_map or config.decoder_layer_map:
        raise ValueError("share: layers are shared already; the surgery unshare separates them again")
    config = config.replace(layer_map=layer_map, decoder_layer_map=decoder_layer_map)
    maps = {"encoder/" if config.encoder_decoder else "": config.layer_map, "decoder/": config.decoder_layer_map}
    flat, shared, axes = flatten(lm.params), dict[str, Any](), dict[str, Axes]()
    for path in flat:
        in_layer = re.fullmatch(r"((?:encoder/|decoder/)?)layers_(\d+)/(.*)", path)
        owners = maps.get(in_layer[1]) if in_layer else None
        if in_layer is None or owners is None:
            shared[path], axes[path] = flat[path], lm.axes[path]
            continue
        stack, number, name = in_layer.groups()
        owner = owners[int(number)]
        members = [f"{stack}layers_{i}/{name}" for i, n in enumerate(owners) if n == owner]
        if path == members[0]:  # the others come with the first
            stored = f"{stack}layers_{owner}/{name}"
            shared[stored] = flat[path] if how == "first" else _mean(members, flat)
            axes[stored] = lm.axes[path]
    return lm.replace(config=config, params=unflatten(shared), axes=axes)


def unshare(lm: LM, context: SurgeryContext = NO_DATA) -> LM:
    """Surgery: every layer has parameters to itself again, equal at first; so transformers can express the model.

    Source: none; it undoes `share`.

    When: transformers should read a model that shares layers, or its layers should train apart.
    """
    config = lm.config
    if not (config.layer_map or config.decoder_layer_map):
        raise ValueError("unshare: no layers are shared")
    params, axes = lm.network.unshared(lm.params), flatten(lm.network.unshared(unflatten(lm.axes)))
    return lm.replace(config=config.replace(layer_map=None, decoder_layer_map=None), params=params, axes=axes)


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
