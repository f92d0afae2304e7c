"""Heads: language modelling, classifiers, poolers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Context, Parameter, attend, dim, dropout
from jaxlm.models.config import ModelConfig
from jaxlm.nn.dense import ACTIVATIONS, dense, dense_spec, norm, norm_spec
from jaxlm.parallel.vocab_padding import mask_padded_logits


def head_spec(config: ModelConfig) -> dict[str, Any]:
    """Parameters of `config.head`; an output projection that is tied to the token embeddings has none."""
    width, inner = dim(embed=config.hidden_size), dim(pooled=config.hidden_size)
    vocab, labels = dim(vocab=config.vocab_size), dim(labels=config.num_labels)
    pooler = {"pooler": dense_spec(width, inner, True, config.init_std)}
    untied = {} if config.tie_embeddings else {"output": dense_spec(width, vocab, False, config.init_std)}
    if config.head in ("causal", "seq2seq"):
        return untied
    if config.head == "masked":
        spec = {"transform": dense_spec(width, dim(embed_out=config.hidden_size), True, config.init_std)}
        spec["norm"] = norm_spec(config.norm, config.hidden_size)
        spec["output"] = untied.get("output", {}) | {"bias": Parameter((vocab,))}
        if config.next_sentence:
            spec |= pooler | {"next_sentence": dense_spec(inner, dim(labels=2), True, config.init_std)}
        return spec
    if config.head == "sequence":
        inputs = inner if config.pooler else width
        bias = config.pooling == "first"
        output = {"output": dense_spec(inputs, labels, bias, config.init_std)}
        return pooler | output if config.pooler else output
    if config.head == "token":
        return {"output": dense_spec(width, labels, True, config.init_std)}
    return pooler if config.head == "pooled" else {}


def apply_head(
    config: ModelConfig, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context
) -> dict[str, jax.Array]:
    """Outputs of the head on `x [batch, length, hidden]`.

    `logits` are float32, accumulated in float32 for every dtype of `x`: `[batch, length, vocab]` (causal, masked,
    seq2seq), `[batch, labels]` (sequence) or `[batch, length, labels]` (token). Also `next_sentence_logits [batch, 2]`
    and `pooled [batch, hidden]` where the config has them.
    """
    head, layers, ctx = config.head, params.get("head", {}), ctx.at("head")
    outputs: dict[str, jax.Array] = {}
    if head == "none":
        return outputs
    if "pooler" in layers:
        outputs["pooled"] = ctx.gated(jnp.tanh(dense(layers["pooler"], _pool(config, x, segments), ctx.at("pooler"))))
    if head in ("causal", "seq2seq"):
        h = x * config.hidden_size**-0.5 if config.scale_head else x
        logits = _vocabulary_logits(config, params, h, ctx)
    elif head == "masked":
        h = ACTIVATIONS[config.activation](dense(layers["transform"], x, ctx.at("transform")))
        h = norm(config.norm, layers["norm"], h, config.norm_eps, ctx.hidden)
        logits = _vocabulary_logits(config, params, h, ctx)
        if config.next_sentence:
            outputs["next_sentence_logits"] = dense(layers["next_sentence"], outputs["pooled"], ctx, jnp.float32)
    elif head == "sequence":
        h = outputs["pooled"] if config.pooler else _pool(config, x, segments)
        logits = dense(layers["output"], dropout(h, config.head_dropout, ctx.at("dropout")), ctx, jnp.float32)
    elif head == "token":
        logits = dense(layers["output"], dropout(x, config.head_dropout, ctx.at("dropout")), ctx, jnp.float32)
    else:
        return outputs
    if head in ("causal", "seq2seq", "masked"):
        logits = mask_padded_logits(ctx.place(logits, ("batch", "length", "vocab")), config.vocab_size)
    return outputs | {"logits": logits}


def _vocabulary_logits(config: ModelConfig, params: Mapping[str, Any], h: jax.Array, ctx: Context) -> jax.Array:
    """The output projection, with the token table as its kernel if it is tied; a masked head adds a bias then too."""
    if not config.tie_embeddings:
        return dense(params["head"]["output"], h, ctx, jnp.float32)
    logits = attend(h, params["embed"]["tokens"]["embedding"], ctx, jnp.float32)
    return logits + params["head"]["output"]["bias"] if config.head == "masked" else logits


def _pool(config: ModelConfig, x: jax.Array, segments: jax.Array) -> jax.Array:
    """The first token, or the last real one: `[batch, hidden]`."""
    if config.pooling == "first":
        return x[:, 0]
    return jnp.take_along_axis(x, last_token(segments)[:, None, None], axis=1)[:, 0]


def last_token(segments: jax.Array) -> jax.Array:
    """Index of the last real token of every row: int `[batch]` for segments `[batch, length]`; 0 without any.

    >>> last_token(jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])).tolist()
    [1, 2, 0]
    """
    return jnp.max(jnp.where(segments > 0, jnp.arange(segments.shape[1]), 0), axis=1)
