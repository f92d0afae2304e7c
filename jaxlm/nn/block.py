"""One Transformer layer: attention, optional cross-attention, feed-forward network, residuals and norms."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import Context, Tokens, dim, dropout, lookup, visit
from jaxlm.nn.attention import attention, attention_spec
from jaxlm.nn.cache import Cache
from jaxlm.nn.dense import ACTIVATIONS, dense, dense_spec, norm, norm_spec
from jaxlm.nn.layer import Layer


def block_spec(layer: Layer, residual_std: float) -> dict[str, Any]:
    """Parameters of one layer."""
    width, units = dim(embed=layer.hidden), dim(ffn=layer.ffn)
    spec = {
        "attention": attention_spec(layer, residual_std),
        "attention_norm": norm_spec(layer.norm, layer.hidden),
    }
    if layer.cross_heads:
        spec["cross_attention"] = attention_spec(layer, residual_std, cross=True)
        spec["cross_attention_norm"] = norm_spec(layer.norm, layer.hidden)
    mlp = {"up": dense_spec(width, units, layer.mlp_bias)}
    if layer.gated:
        mlp = {"gate_proj": dense_spec(width, units, layer.mlp_bias)} | mlp
    mlp["down"] = dense_spec(units, width, layer.mlp_bias, std=residual_std)
    return spec | {"mlp": mlp, "mlp_norm": norm_spec(layer.norm, layer.hidden)}


class BlockInputs(NamedTuple):
    """Inputs of every layer of a stack, apart from the residual stream.

    Attributes:
      queries, keys: tokens of the residual stream and of what it may attend to (the same without a cache).
      bias: relative position bias `[1 or batch, heads, queries, keys]`, or `None`.
      source, source_tokens: encoder output and its tokens, for cross-attention.
      start: int `[batch]`, index in the cache at which each row's new keys and values are written; `None` without one.
    """

    queries: Tokens
    keys: Tokens
    bias: jax.Array | None = None
    source: jax.Array | None = None
    source_tokens: Tokens | None = None
    start: jax.Array | None = None


class BlockOutput(NamedTuple):
    """The residual stream after the layer, the tapped activations by site, and its updated cache."""

    x: jax.Array
    taps: dict[str, jax.Array]
    cache: dict[str, Cache] | None


def block(
    params: Mapping[str, Any],
    x: jax.Array,
    layer: Layer,
    inputs: BlockInputs,
    cache: Mapping[str, Cache] | None,
    ctx: Context,
    taps: Collection[str] = (),
) -> BlockOutput:
    """One layer on `x [batch, length, hidden]`; `taps` are sites of `Tap`.

    Pre-norm: `x + f(norm(x))` for each sublayer f; post-norm: `norm(x + f(x))`. The sites `after_…` change what f
    gives; the site `gate` scales the whole layer's update of the residual stream: `x + g · (layer(x) - x)`.
    """
    new_cache: dict[str, Cache] = {}
    tapped: dict[str, jax.Array] = {}

    def attend_to(name: str, h: jax.Array) -> jax.Array:
        cross = name == "cross_attention"
        attended = attention(
            params[name],
            h,
            layer,
            inputs.queries,
            inputs.source_tokens if cross and inputs.source_tokens is not None else inputs.keys,
            ctx=ctx.at(name),
            bias=None if cross else _bias_of_heads(layer, inputs.bias),
            cross=cross,
            source=inputs.source,
            cache=None if cache is None else cache[name],
            start=inputs.start,
            taps=() if cross else [site for site in taps if site != "hidden"],
        )
        if attended.cache is not None:
            new_cache[name] = attended.cache
        tapped.update(attended.taps)
        return attended.output

    def sublayer(h: jax.Array, name: str, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        normed = lambda x: norm(layer.norm, params[f"{name}_norm"], x, layer.norm_eps, ctx.hidden)  # noqa: E731
        inputs = normed(h) if layer.pre_norm else h
        update = visit(params, f"after_{name}", function(inputs), ctx, inputs)
        h = h + ctx.gated(dropout(update, layer.dropout, ctx.at(f"{name}_dropout")))
        h = ctx.place(h, ("batch", "length", "activation"))
        return h if layer.pre_norm else normed(h)

    # The sublayers in their order, then the gate of the whole layer.
    y = sublayer(x, "attention", lambda h: attend_to("attention", h))
    if layer.cross_heads:
        y = sublayer(y, "cross_attention", lambda h: attend_to("cross_attention", h))
    y = sublayer(y, "mlp", lambda h: mlp(params["mlp"], h, layer, ctx.at("mlp")))
    if "gate" in params:
        y = x + params["gate"](y - x, ctx)
    if "hidden" in taps:
        tapped["hidden"] = y
    return BlockOutput(y, tapped, new_cache if cache is not None else None)


def mlp(params: Mapping[str, Any], x: jax.Array, layer: Layer, ctx: Context) -> jax.Array:
    """`act(x up) down`, or gated: `(act(x gate_proj) * (x up)) down`; the site `gate` acts on the units."""
    activation = lookup(ACTIVATIONS, layer.activation, "activation")
    activate = lambda h: activation(h.astype(jnp.float32)).astype(h.dtype)  # noqa: E731
    h = dense(params["up"], x, ctx.at("up"))
    h = activate(dense(params["gate_proj"], x, ctx.at("gate_proj"))) * h if layer.gated else activate(h)
    h = visit(params, "gate", ctx.place(h, ("batch", "length", "ffn")), ctx)
    return dense(params["down"], h, ctx.at("down"))


def _bias_of_heads(layer: Layer, bias: jax.Array | None) -> jax.Array | None:
    """The columns of the shared relative-position bias that belong to the heads this layer still has."""
    if bias is None or layer.position_heads is None:
        return bias
    return bias[:, jnp.array(layer.position_heads)]
