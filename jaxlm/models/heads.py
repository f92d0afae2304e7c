"""Heads: language modelling, classifiers, poolers. One entry of HEADS is all that the network knows of a head.

What a family's checkpoints call the tensors of a head is the family's to say: `Family.heads`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlm.core import Context, Parameter, attend, dim, dropout
from jaxlm.nn.dense import ACTIVATIONS, dense, dense_spec, norm, norm_spec
from jaxlm.parallel.vocab_padding import mask_padded_logits

Config = Any
"""A ModelConfig, which knows the names of heads from here."""
Outputs = dict[str, jax.Array]


class HeadSpec(Protocol):
    """Declares a head's parameters."""

    def __call__(self, config: Config, /) -> dict[str, Any]:
        """The subtree `head`; empty where there is none."""
        ...


class ApplyHead(Protocol):
    """The forward pass of a head."""

    def __call__(
        self, config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context, /
    ) -> Outputs:
        """Outputs on `x [batch, length, hidden]`, the stack's, in the dtype of activations; `logits` are float32.

        Args:
          params: of the whole network, since a tied output is the token table; the head's own are `params["head"]`.
          segments: int `[batch, length]`, 0 for padding.
          ctx: at the head.
        """
        ...


class HeadFields(Protocol):
    """Which fields of a config a head gives a meaning to."""

    def __call__(self, config: Config, /) -> tuple[str, ...]:
        """Some of HEAD_FIELDS; the others change nothing in a network with this head."""
        ...


class Head(NamedTuple):
    """What stands on the body of a network.

    Attributes:
      spec: its parameters.
      apply: its outputs.
      fields: the fields of HEAD_FIELDS that it reads.
      labelled: its outputs are the classes `config.labels`, or with `config.regression` one number.
      per_token: it has an output a token, and not one a row.
      vocabulary: its classes are the tokens, and its output projection the token table where that is tied.
      generates: it predicts the token that follows, so that a model writes with it.
      bare: it is part of the class that transformers calls the model itself, whose tensors have no prefix.
    """

    spec: HeadSpec
    apply: ApplyHead
    fields: HeadFields = lambda config: ()
    labelled: bool = False
    per_token: bool = False
    vocabulary: bool = False
    generates: bool = False
    bare: bool = False


HEAD_FIELDS = ("labels", "regression", "pooling", "pooler", "next_sentence", "tie_embeddings", "scale_head")
"""Fields of ModelConfig that mean something to some heads, and nothing to the body."""


def head_spec(config: Config) -> dict[str, Any]:
    """Parameters of `config.head`; an output projection that is tied to the token embeddings has none."""
    return HEADS[config.head].spec(config)


def apply_head(config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context) -> Outputs:
    """Outputs of `config.head` on `x [batch, length, hidden]`.

    `logits` are float32, accumulated in float32 for every dtype of `x`: `[batch, length, vocab]` (causal, masked,
    seq2seq), `[batch, labels]` (sequence) or `[batch, length, labels]` (token). Also `next_sentence_logits [batch, 2]`
    and `pooled [batch, hidden]` where the config has them.
    """
    return HEADS[config.head].apply(config, params, x, segments, ctx.at("head"))


# -- language modelling -----------------------------------------------------------------------------------------------


def language_spec(config: Config) -> dict[str, Any]:
    """The output projection, unless it is the token table."""
    if config.tie_embeddings:
        return {}
    width, vocab = dim(embed=config.hidden_size), dim(vocab=config.vocab_size)
    return {"output": dense_spec(width, vocab, False, config.init_std)}


def language(config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context) -> Outputs:
    """`logits [batch, length, vocab]`."""
    h = x * config.hidden_size**-0.5 if config.scale_head else x
    return {"logits": _vocabulary_logits(config, _projected(config, params, h, ctx), ctx)}


def language_fields(config: Config) -> tuple[str, ...]:
    return ("tie_embeddings", "scale_head")


def masked_spec(config: Config) -> dict[str, Any]:
    """A transform, the projection with its bias, and where it predicts the next sentence a pooler and two classes."""
    width, inner = dim(embed=config.hidden_size), dim(embed_out=config.hidden_size)
    spec: dict[str, Any] = {"transform": dense_spec(width, inner, True, config.init_std)}
    spec["norm"] = norm_spec(config.norm, config.hidden_size)
    spec["output"] = language_spec(config).get("output", {}) | {"bias": Parameter((dim(vocab=config.vocab_size),))}
    if config.next_sentence:
        spec |= pooler_spec(config)
        spec["next_sentence"] = dense_spec(dim(pooled=config.hidden_size), dim(labels=2), True, config.init_std)
    return spec


def masked(config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context) -> Outputs:
    """`logits [batch, length, vocab]`; with `config.next_sentence` also `pooled` and `next_sentence_logits`."""
    layers = params["head"]
    outputs = pooled(config, params, x, segments, ctx) if config.next_sentence else {}
    h = ACTIVATIONS[config.activation](dense(layers["transform"], x, ctx.at("transform")))
    h = norm(config.norm, layers["norm"], h, config.norm_eps, ctx.hidden)
    logits = _projected(config, params, h, ctx)
    if config.tie_embeddings:  # an untied projection has added its bias
        logits = logits + layers["output"]["bias"]
    logits = _vocabulary_logits(config, logits, ctx)
    if config.next_sentence:
        outputs["next_sentence_logits"] = dense(layers["next_sentence"], outputs["pooled"], ctx, jnp.float32)
    return outputs | {"logits": logits}


def masked_fields(config: Config) -> tuple[str, ...]:
    return (*language_fields(config), "next_sentence", *(("pooling",) if config.next_sentence else ()))


def _projected(config: Config, params: Mapping[str, Any], h: jax.Array, ctx: Context) -> jax.Array:
    """The output projection of `h`, float32; the token table is its kernel if it is tied."""
    if config.tie_embeddings:
        return attend(h, params["embed"]["tokens"]["embedding"], ctx, jnp.float32)
    return dense(params["head"]["output"], h, ctx, jnp.float32)


def _vocabulary_logits(config: Config, logits: jax.Array, ctx: Context) -> jax.Array:
    """Logits of the vocabulary, placed, without those of tokens that only pad it."""
    return mask_padded_logits(ctx.place(logits, ("batch", "length", "vocab")), config.vocab_size)


# -- one output a row -------------------------------------------------------------------------------------------------


def pooler_spec(config: Config) -> dict[str, Any]:
    """A layer of the stream's width on the pooled token."""
    width, inner = dim(embed=config.hidden_size), dim(pooled=config.hidden_size)
    return {"pooler": dense_spec(width, inner, True, config.init_std)}


def pooled(config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context) -> Outputs:
    """`pooled [batch, hidden]`, `tanh(W h + b)` of one token of every row."""
    h = dense(params["head"]["pooler"], _pool(config, x, segments), ctx.at("pooler"))
    return {"pooled": ctx.gated(jnp.tanh(h))}


def sequence_spec(config: Config) -> dict[str, Any]:
    """A pooler, where the config has one, and an output a class."""
    inputs = dim(pooled=config.hidden_size) if config.pooler else dim(embed=config.hidden_size)
    bias = config.pooling == "first"
    output = {"output": dense_spec(inputs, dim(labels=config.num_labels), bias, config.init_std)}
    return pooler_spec(config) | output if config.pooler else output


def sequence(config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context) -> Outputs:
    """`logits [batch, labels]` of one token of every row, and `pooled` where it passes a pooler."""
    outputs = pooled(config, params, x, segments, ctx) if config.pooler else {}
    h = outputs["pooled"] if config.pooler else _pool(config, x, segments)
    return outputs | {"logits": _classified(config, params, h, ctx)}


def _pool(config: Config, x: jax.Array, segments: jax.Array) -> jax.Array:
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


# -- one output a token -----------------------------------------------------------------------------------------------


def token_spec(config: Config) -> dict[str, Any]:
    """An output a class."""
    width, labels = dim(embed=config.hidden_size), dim(labels=config.num_labels)
    return {"output": dense_spec(width, labels, True, config.init_std)}


def token(config: Config, params: Mapping[str, Any], x: jax.Array, segments: jax.Array, ctx: Context) -> Outputs:
    """`logits [batch, length, labels]`."""
    return {"logits": _classified(config, params, x, ctx)}


def _classified(config: Config, params: Mapping[str, Any], h: jax.Array, ctx: Context) -> jax.Array:
    """A classifier's float32 logits of `h`, after dropout."""
    return dense(params["head"]["output"], dropout(h, config.head_dropout, ctx.at("dropout")), ctx, jnp.float32)


# -- the registry -----------------------------------------------------------------------------------------------------

_generating = Head(language_spec, language, language_fields, per_token=True, vocabulary=True, generates=True)

HEADS: dict[str, Head] = {
    "causal": _generating,
    "masked": Head(masked_spec, masked, masked_fields, per_token=True, vocabulary=True),
    "sequence": Head(
        sequence_spec, sequence, lambda config: ("labels", "regression", "pooling", "pooler"), labelled=True
    ),
    "token": Head(token_spec, token, lambda config: ("labels", "regression"), labelled=True, per_token=True),
    "seq2seq": _generating,
    "pooled": Head(pooler_spec, pooled, lambda config: ("pooling",), bare=True),
    "none": Head(lambda config: {}, lambda config, params, x, segments, ctx: {}, bare=True),
}
"""Heads by the name that `config.head` uses."""
