"""Attention: multi-head, grouped-query and cross, with masks from segments, and a cache for decoding."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from jaxlm.core import Context, dim, visit
from jaxlm.nn.dense import dense, dense_spec
from jaxlm.nn.dot_product import dot_product_attention, scores
from jaxlm.nn.layer import Layer
from jaxlm.nn.position import rotate


class Tokens(NamedTuple):
    """Where the tokens of one side of an attention are.

    Attributes:
      segments: int `[batch, length]`; 0 is padding, tokens see only their own segment.
      order: int `[length]` or `[batch, length]`, place in the row (what causality compares).
      positions: int `[batch, length]`, position inside the document (what rotary reads and windows compare: padding
        inside a prompt takes no room in them).
    """

    segments: jax.Array
    order: jax.Array
    positions: jax.Array


def attention_spec(layer: Layer, residual_std: float, cross: bool = False) -> dict[str, Any]:
    """Query, key, value and output products. Heads are laid out `(kv_heads, q_per_kv, head_dim)`."""
    kv_heads, q_per_kv = (layer.cross_heads, 1) if cross else (layer.kv_heads, layer.q_per_kv)
    width = dim(embed=layer.hidden)
    queries = dim(kv_heads=kv_heads, q_per_kv=q_per_kv, head_dim=layer.head_dim)
    keys = dim(kv_heads=kv_heads, head_dim=layer.head_dim)
    return {
        "query": dense_spec(width, queries, layer.qkv_bias),
        "key": dense_spec(width, keys, layer.qkv_bias),
        "value": dense_spec(width, keys, layer.qkv_bias),
        "output": dense_spec(queries, width, layer.output_bias, std=residual_std),
    }


def allowed(layer: Layer, queries: Tokens, keys: Tokens, causal: bool) -> jax.Array:
    """Which key each query may see: bool `[batch, queries, keys]`."""
    order_q, order_k = queries.order[..., :, None], keys.order[..., None, :]
    seen = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments > 0)[:, None, :]
    if causal:
        seen &= order_k <= order_q
    if layer.window is not None:
        behind = queries.positions[:, :, None] - keys.positions[:, None, :]
        seen &= behind < layer.window
        if not causal:
            seen &= -behind < layer.window
    return seen


def project(params: Mapping[str, Any], x: jax.Array, heads: tuple[int, ...], ctx: Context) -> jax.Array:
    """A dense product split into heads: `[batch, length, *heads]`."""
    return dense(params, x, ctx).reshape(*x.shape[:-1], *heads)


class Attended(NamedTuple):
    """What attention gives: the output, the tapped activations by site (see `Tap`), and keys and values."""

    output: jax.Array
    taps: dict[str, jax.Array]
    cache: dict[str, jax.Array] | None


def attention(
    params: Mapping[str, Any],
    x: jax.Array,
    layer: Layer,
    queries: Tokens,
    keys: Tokens,
    *,
    ctx: Context,
    bias: jax.Array | None = None,
    cross: bool = False,
    source: jax.Array | None = None,
    cache: Mapping[str, jax.Array] | None = None,
    start: jax.Array | int = 0,
    taps: Collection[str] = (),
) -> Attended:
    """`softmax(q kᵀ · s + bias) v`, projected back; softmax in float32.

    Args:
      params: `query`, `key`, `value`, `output`, and optionally the site `gate` over KV heads.
      x: `[batch, queries, hidden]`.
      layer: structure; with `cross` its heads are `cross_heads` and nothing is causal.
      queries, keys: places of the tokens on both sides.
      bias: `[1, heads, queries, keys]`, added to the scores (relative positions).
      source: `[batch, keys, hidden]` that a cross-attention reads; `None` when its keys and values are in the cache.
      cache: `key` and `value` `[batch, keys, kv_heads, head_dim]` of a decoder; the new ones are written at `start`.
      taps: sites of activations to give out; the others are not kept.
    """
    kv_heads, q_per_kv = (layer.cross_heads, 1) if cross else (layer.kv_heads, layer.q_per_kv)
    rotary = None if cross else layer.rotary
    q = project(params["query"], x, (kv_heads, q_per_kv, layer.head_dim), ctx.at("query"))
    found = {"query": q.reshape(*q.shape[:2], -1, q.shape[-1])}
    q = q if rotary is None else rotate(q, queries.positions, rotary)
    inputs = source if cross else x
    if inputs is None:
        assert cache is not None, "a cross-attention without source reads its cache"
        k, v = cache["key"], cache["value"]
    else:
        k = project(params["key"], inputs, (kv_heads, layer.head_dim), ctx.at("key"))
        v = project(params["value"], inputs, (kv_heads, layer.head_dim), ctx.at("value"))
        found |= {"key": k, "value": v}
        k = k if rotary is None else rotate(k, queries.positions, rotary)
        if cache is not None and not cross:
            k = jax.lax.dynamic_update_slice_in_dim(cache["key"], k.astype(cache["key"].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["value"], v.astype(cache["value"].dtype), start, axis=1)
    new_cache = None if cache is None else {"key": k, "value": v}
    q, k, v = (ctx.place(t, ("batch", None, "kv_heads") + (None,) * (t.ndim - 3)) for t in (q, k, v))
    if layer.scale_scores:
        q = q * layer.head_dim**-0.5
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, q_per_kv, *bias.shape[2:])
    seen = allowed(layer, queries, keys, causal=layer.causal and not cross)
    mixed = dot_product_attention(layer.attention_dropout, q, k, v, bias, seen, ctx.at("probabilities").key)
    output = dense(params["output"], visit(params, "gate", mixed, ctx).reshape(*x.shape[:-1], -1), ctx.at("output"))
    if not found.keys() >= set(taps):
        found["scores"] = scores(q, k, bias, seen).reshape(x.shape[0], -1, *seen.shape[1:])
        found["attention"] = jax.nn.softmax(found["scores"], axis=-1).astype(x.dtype)
    return Attended(output, {site: found[site] for site in taps}, new_cache)
