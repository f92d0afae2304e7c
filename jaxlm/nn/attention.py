"""Attention: multi-head, grouped-query and cross, with masks from segments, and a cache for decoding."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import Context, Prefix, Tokens, dim, visit
from jaxlm.nn.cache import Cache
from jaxlm.nn.dense import dense, dense_spec
from jaxlm.nn.dot_product import dot_product_attention, scores
from jaxlm.nn.layer import Layer
from jaxlm.nn.position import rotate


def attention_spec(layer: Layer, residual_std: float, cross: bool = False) -> dict[str, Any]:
    """Parameters of the four projections; heads are in the order `(kv_heads, q_per_kv, head_dim)`."""
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


def attention_mask(layer: Layer, queries: Tokens, keys: Tokens, causal: bool) -> jax.Array:
    """Which keys each query attends to: bool `[batch, queries, keys]`, of segments, causality and the window."""
    order_q, order_k = queries.order[..., :, None], keys.order[..., None, :]
    mask = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments > 0)[:, None, :]
    if causal:
        mask &= order_k <= order_q
    if layer.window is not None:
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]
        mask &= distance < layer.window
        if not causal:
            mask &= -distance < layer.window
    return mask


def project(params: Mapping[str, Any], x: jax.Array, heads: tuple[int, ...], ctx: Context) -> jax.Array:
    """A dense projection split into heads: `[batch, length, *heads]`."""
    return dense(params, x, ctx).reshape(*x.shape[:-1], *heads)


class AttentionOutput(NamedTuple):
    """Output `[batch, queries, hidden]`, the tapped activations by site (see `Tap`), and the updated cache."""

    output: jax.Array
    taps: dict[str, jax.Array]
    cache: Cache | None


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
    cache: Cache | None = None,
    start: jax.Array | None = None,
    taps: Collection[str] = (),
) -> AttentionOutput:
    """`softmax(q kᵀ · s + bias) v`, projected back; softmax in float32.

    Args:
      params: `query`, `key`, `value`, `output`, and optionally the sites `gate` (over KV heads), `kv_prefix` and
        `attention_scores`.
      x: `[batch, queries, hidden]`.
      layer: structure; with `cross` its heads are `cross_heads` and nothing is causal.
      queries, keys: segments and positions of the tokens on both sides.
      bias: `[1 or batch, heads, queries, keys]`, added to the scores (relative positions).
      cross: a cross-attention, which reads `source`.
      source: encoder output `[batch, keys, hidden]` of a cross-attention; `None` when the cache holds its keys and
        values.
      cache: keys and values of a decoder so far, or of the encoder; `keys` are all tokens that it may hold.
      start: int `[batch]`, index in the row of the first token of `x`: where its keys are written.
      taps: sites of the activations to return; the others are not kept. Scores and probabilities are those of the
        tokens, so that the probabilities beside a prefix add up to less than 1.
    """
    # Projections, rotary positions and the cache.
    kv_heads, q_per_kv = (layer.cross_heads, 1) if cross else (layer.kv_heads, layer.q_per_kv)
    rotary = None if cross else layer.rotary
    q = project(params["query"], x, (kv_heads, q_per_kv, layer.head_dim), ctx.at("query"))
    activations = {"query": q.reshape(*q.shape[:2], -1, q.shape[-1])}
    q = q if rotary is None else rotate(q, queries.positions, rotary)
    kv_inputs = source if cross else x
    if kv_inputs is None:
        assert cache is not None, "a cross-attention without source reads its cache"
    else:
        k = project(params["key"], kv_inputs, (kv_heads, layer.head_dim), ctx.at("key"))
        v = project(params["value"], kv_inputs, (kv_heads, layer.head_dim), ctx.at("value"))
        activations |= {"key": k, "value": v}
        k = k if rotary is None else rotate(k, queries.positions, rotary)
        if cache is not None:
            cache = cache.write(k, v, jnp.zeros(x.shape[0], jnp.int32) if cross or start is None else start)
    if cache is not None:
        k, v, valid = cache.read()
        keys = cache.tokens(keys)
        keys = keys._replace(segments=jnp.where(valid, keys.segments, 0))
    # Attention of every query head on the keys and values of its group.
    q, k, v = (ctx.place(t, ("batch", None, "kv_heads") + (None,) * (t.ndim - 3)) for t in (q, k, v))
    if layer.scale_scores:
        q = q * layer.head_dim**-0.5
    if "attention_scores" in params:
        added = params["attention_scores"](queries, keys, ctx.at("attention_scores"))
        bias = added if bias is None else bias + added
        shape = (kv_heads * q_per_kv, q.shape[1], k.shape[1])
        bias = jnp.broadcast_to(bias, (bias.shape[0] if bias.ndim == 4 else 1, *shape))
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, q_per_kv, *bias.shape[2:])
    mask = attention_mask(layer, queries, keys, causal=layer.causal and not cross)
    num_keys = k.shape[1]
    if "kv_prefix" in params:
        k, v, bias, mask = _with_prefix(params["kv_prefix"](ctx.at("kv_prefix")), k, v, bias, mask, ctx)
    heads = dot_product_attention(layer.attention_dropout, q, k, v, bias, mask, ctx.at("probabilities").key)
    output = dense(params["output"], visit(params, "gate", heads, ctx).reshape(*x.shape[:-1], -1), ctx.at("output"))
    # The scores, which attention itself does not keep, are computed a second time for a tap.
    if not activations.keys() >= set(taps):
        all_scores = scores(q, k, bias, mask).reshape(x.shape[0], -1, *mask.shape[1:])
        activations["scores"] = all_scores[..., -num_keys:]
        activations["attention"] = jax.nn.softmax(all_scores, axis=-1).astype(x.dtype)[..., -num_keys:]
    return AttentionOutput(output, {site: activations[site] for site in taps}, cache)


def _with_prefix(prefix: Prefix, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array, ctx: Context):
    """Keys, values, bias and mask with those of a prefix before them: no bias, and never masked."""

    def joined(before: jax.Array, after: jax.Array) -> jax.Array:
        before = jnp.broadcast_to(before.astype(after.dtype), (after.shape[0], *before.shape[1:]))
        return jnp.concatenate([ctx.place(before, ("batch", None, "kv_heads", None)), after], axis=1)

    length = prefix.keys.shape[1]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (length, 0)), constant_values=True)
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0),) * 4 + ((length, 0),))
    return joined(prefix.keys, k), joined(prefix.values, v), bias, mask
