"""The network of every family: embeddings, a stack (or an encoder and a decoder) and a head, as a ModelConfig says."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen

from jaxlm.core import Context, Parameter, Tap, Tokens, dim, dropout, initialize, text_rows, visit
from jaxlm.models import heads
from jaxlm.models.config import ModelConfig
from jaxlm.nn.block import BlockInputs, block_spec
from jaxlm.nn.cache import DenseCache, write_rows
from jaxlm.nn.dense import embed, embedding_spec, norm, norm_spec, residual_std
from jaxlm.nn.layer import Layer
from jaxlm.nn.position import relative_bucket
from jaxlm.nn.stack import runs, stack


def model_spec(config: ModelConfig) -> dict[str, Any]:
    """Every parameter of the network in the canonical view."""
    width = config.hidden_size
    table: dict[str, Any] = {"tokens": embedding_spec(config.vocab_size, "vocab", width, config.init_std)}
    if config.max_positions:
        table["positions"] = embedding_spec(
            config.max_positions + config.position_offset, "positions", width, config.init_std
        )
    if config.type_vocab_size:
        table["types"] = embedding_spec(config.type_vocab_size, "types", width, config.init_std)
    if config.embed_norm:
        table["norm"] = norm_spec(config.norm, width)
    spec: dict[str, Any] = {"embed": table}
    if config.encoder_decoder:
        spec["encoder"] = _stack_spec(config, config.layers(), config.stored_layers())
        spec["decoder"] = _stack_spec(config, config.decoder_layers(), config.stored_layers(decoder=True))
    else:
        spec |= _stack_spec(config, config.layers(), config.stored_layers())
    return spec | {"head": top} if (top := heads.head_spec(config)) else spec


def _stack_spec(config: ModelConfig, layers: tuple[Layer, ...], stored: tuple[int, ...]) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    if config.relative_buckets:
        columns = max(
            max(layer.position_heads, default=-1) + 1 if layer.position_heads else layer.heads for layer in layers
        )
        shape = (dim(buckets=config.relative_buckets), dim(position_heads=columns))
        spec["relative_positions"] = {"embedding": Parameter(shape, std=config.init_std)}
    for number, first in enumerate(stored):  # a shared layer has the structure of the first that uses it
        spec[f"layers_{number}"] = block_spec(layers[first], residual_std(len(layers), config.init_std))
    if config.final_norm:
        spec["final_norm"] = norm_spec(config.norm, config.hidden_size)
    return spec


def forward(
    config: ModelConfig,
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    ctx: Context = Context(),
    taps: Collection[Tap] = (),
    cache: Mapping[str, Any] | None = None,
    head_at: jax.Array | None = None,
    remat: str = "none",
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """The forward pass, in either view of the parameters.

    Args:
      config: structure.
      params: canonical or run view; the site `hidden` at the root gates the residual stream of all layers.
      batch: `input_ids` int `[batch, length]`, and optionally `attention_mask` (1 = token) or `segment_ids` (0 =
        padding) with `positions`, `token_type_ids`, and for an encoder-decoder `decoder_input_ids` and
        `decoder_attention_mask`; columns `rows/…` are what Weights and Sites read in `ctx.rows`. Of groups of texts,
        `[rows, group, length]`, the outputs are those of the texts, `batch = rows · group` of them (see `text_rows`).
      ctx: dropout key and placement.
      taps: activations returned in `outputs["taps"]`; those of an encoder have the prefix `encoder_` in their site.
      cache: of `empty_cache`; `input_ids` (`decoder_input_ids`) are then the tokens that follow those in the cache.
      head_at: int `[batch]`, index of the only token of each row that the head reads; by default it reads all. The
        logits of a language model are then `[batch, 1, vocab]`.
      remat: what layers keep for the backward pass (`none`, `full`, `dots`).
      dtype: of activations and products; norms, softmax and logits stay float32.

    Returns:
      `logits` float32 (see `apply_head`), `last_hidden`, `taps`, and `cache` if one was passed.
    """
    batch = text_rows(batch)
    check_length(config, batch["input_ids"].shape[1] if "input_ids" in batch and cache is None else 0)
    ctx = with_stream_gate(params, ctx).with_rows(batch)
    run = _encoder_decoder if config.encoder_decoder else _single_stack
    x, segments, outputs = run(
        config, params, batch, ctx=ctx, taps=frozenset(taps), cache=cache, remat=remat, dtype=dtype
    )
    head_inputs = x
    if head_at is not None:
        head_inputs = jnp.take_along_axis(x, head_at[:, None, None], axis=1)
        segments = jnp.take_along_axis(segments, head_at[:, None], axis=1)
    return {"last_hidden": x} | outputs | heads.apply_head(config, params, head_inputs, segments, ctx)


def check_length(config: ModelConfig, length: int) -> None:
    """Raises ValueError for rows longer than the table of positions, whose embeddings would be NaN."""
    if config.max_positions and length > config.max_positions:
        raise ValueError(
            f"rows of {length} tokens, but the model has {config.max_positions} positions; shorten the rows "
            "(config.data.max_length), or take a model with more (config.model.max_positions)"
        )


def with_stream_gate(params: Mapping[str, Any], ctx: Context) -> Context:
    """The context with the gate of the residual stream, if the parameters have the site `hidden`."""
    return ctx.replace(hidden=params["hidden"].open(ctx.at("hidden"))) if "hidden" in params else ctx


class Stream(NamedTuple):
    """The state of a stack between two layers.

    Attributes:
      x: residual stream `[batch, length, hidden]`.
      inputs: the other inputs of every layer.
      hidden: gate of the residual stream `[hidden]`, or `None`.
      rows: of the batch, as in `Context`.
    """

    x: jax.Array
    inputs: BlockInputs
    hidden: jax.Array | None = None
    rows: Mapping[str, jax.Array] = {}

    def context(self, ctx: Context) -> Context:
        """`ctx` with what the pass that this stream belongs to has in it."""
        return ctx.replace(hidden=self.hidden, rows=self.rows)


def embed_inputs(
    config: ModelConfig,
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    side: str = "",
    *,
    source: Stream | None = None,
    cache: Mapping[str, Any] | None = None,
    ctx: Context = Context(),
    dtype: Any = jnp.float32,
) -> Stream:
    """The input of the first layer of a stack: embedded tokens, with their segments and positions.

    Args:
      side: `""` for a single stack, `encoder/` or `decoder/`.
      source: the finished stream of the encoder, which a decoder reads.
    """
    prefix = "decoder_" if side == "decoder/" else ""
    ids = batch[f"{prefix}input_ids"]
    tokens, start, keys = _tokens(ids, batch, cache, prefix)
    if config.position_offset and config.pad_token_id is not None and cache is None and "positions" not in batch:
        # RoBERTa counts positions over real tokens; padding has position -1.
        real = jnp.asarray(ids) != config.pad_token_id
        tokens = tokens._replace(positions=jnp.cumsum(real, axis=1) * real - 1)
    types = None if side else batch.get("token_type_ids")
    side_params = stack_params(params, side)
    x = _embed(config, params["embed"], side_params, ids, tokens, types, ctx, dtype)
    bias = _bias(config, side_params, tokens, keys, config.causal if not side else bool(prefix))
    inputs = BlockInputs(tokens, keys, bias, start=start)
    if source is not None:
        inputs = inputs._replace(source=source.x, source_tokens=source.inputs.queries)
    return Stream(x, inputs, ctx.hidden, ctx.rows)


def finalize(config: ModelConfig, params: Mapping[str, Any], x: jax.Array, ctx: Context, side: str = "") -> jax.Array:
    """The output of a stack from the residual stream after its last layer: the final norm, where the config has one."""
    if not config.final_norm:
        return x
    return norm(config.norm, stack_params(params, side)["final_norm"], x, config.norm_eps, ctx.hidden)


def stack_params(params: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    """The parameters of a stack: the subtree `encoder` or `decoder`, or the whole tree."""
    return params[side.removesuffix("/")] if side else params


def _single_stack(config, params, batch, *, ctx, taps, cache, remat, dtype):
    """An encoder-only or decoder-only model: its output, the segments of its tokens, and taps and cache."""
    x, inputs, *_ = embed_inputs(config, params, batch, cache=cache, ctx=ctx, dtype=dtype)
    layer_cache = None if cache is None else cache["layers"]
    x, tapped, layer_cache = stack(
        params, x, config.layers(), inputs, config.layer_map, cache=layer_cache, ctx=ctx, taps=taps, remat=remat
    )
    outputs: dict[str, Any] = {"taps": tapped}
    if cache is not None:
        length = inputs.start + batch["input_ids"].shape[1]
        outputs["cache"] = {"layers": layer_cache, "segments": inputs.keys.segments, "length": length}
    return finalize(config, params, x, ctx), inputs.queries.segments, outputs


def _encoder_decoder(config, params, batch, *, ctx, taps, cache, remat, dtype):
    """An encoder-decoder; once the cache holds the encoder's keys and values, the decoder alone."""
    if "input_ids" in batch:
        source, source_tokens, encoder_taps = _encoder(config, params, batch, ctx, taps, remat, dtype)
        if cache is not None and cache["source_segments"].shape != source_tokens.segments.shape:
            raise ValueError(
                f"an encoder input of shape {source_tokens.segments.shape} for a cache of "
                f"{cache['source_segments'].shape}; make it with empty_cache(…, source=length of the input)"
            )
    else:
        source, source_tokens, encoder_taps = None, _tokens_in_order(cache["source_segments"]), {}
    decoder_ctx = ctx.at("decoder")
    x, inputs, *_ = embed_inputs(config, params, batch, "decoder/", cache=cache, ctx=decoder_ctx, dtype=dtype)
    inputs = inputs._replace(source=source, source_tokens=source_tokens)
    layer_cache = None if cache is None else cache["layers"]
    x, tapped, layer_cache = stack(
        params["decoder"],
        x,
        config.decoder_layers(),
        inputs,
        config.decoder_layer_map,
        cache=layer_cache,
        ctx=decoder_ctx,
        taps={t for t in taps if not t.site.startswith("encoder_")},
        remat=remat,
    )
    x = dropout(finalize(config, params, x, ctx, "decoder/"), config.dropout, ctx.at("output"))
    outputs: dict[str, Any] = {"taps": encoder_taps | tapped}
    if cache is not None:
        outputs["cache"] = {
            "layers": layer_cache,
            "segments": inputs.keys.segments,
            "length": inputs.start + batch["decoder_input_ids"].shape[1],
            "source_segments": source_tokens.segments,
        }
    return x, inputs.queries.segments, outputs


def _encoder(config, params, batch, ctx, taps, remat, dtype) -> tuple[jax.Array, Tokens, dict[Tap, jax.Array]]:
    """The encoder of an encoder-decoder: its output `[batch, length, hidden]`, its tokens, and its taps."""
    encoder_ctx = ctx.at("encoder")
    x, inputs, *_ = embed_inputs(config, params, batch, "encoder/", ctx=encoder_ctx, dtype=dtype)
    sites = {Tap(t.site.removeprefix("encoder_"), t.depth) for t in taps if t.site.startswith("encoder_")}
    x, tapped, _ = stack(
        params["encoder"], x, config.layers(), inputs, config.layer_map, ctx=encoder_ctx, taps=sites, remat=remat
    )
    output = dropout(finalize(config, params, x, ctx, "encoder/"), config.dropout, ctx.at("source"))
    return output, inputs.queries, {Tap(f"encoder_{t.site}", t.depth): value for t, value in tapped.items()}


def _tokens_in_order(segments: jax.Array) -> Tokens:
    """Tokens whose positions are their indices in the row."""
    order = jnp.arange(segments.shape[1])
    return Tokens(segments, order, jnp.broadcast_to(order, segments.shape))


def _tokens(
    ids: jax.Array, batch: Mapping[str, Any], cache: Any, prefix: str
) -> tuple[Tokens, jax.Array | None, Tokens]:
    """The input tokens, their first index in the cache, and the tokens they may attend to (the cached ones too)."""
    segments = batch.get(f"{prefix}segment_ids", batch.get(f"{prefix}attention_mask"))
    segments = jnp.ones_like(ids) if segments is None else jnp.asarray(segments)
    if cache is None:
        tokens = _tokens_in_order(segments)
        positions = batch.get(f"{prefix}positions")
        if positions is not None:
            tokens = tokens._replace(positions=jnp.asarray(positions))
        return tokens, None, tokens
    start = cache["length"]
    order = start[:, None] + jnp.arange(ids.shape[1])
    cached = write_rows(cache["segments"], segments, start)
    # A prompt may be padded on either side: a token's position is the number of real tokens before it in its row.
    counts = jnp.cumsum(cached > 0, axis=1) - 1
    positions = jnp.take_along_axis(counts, order, axis=1, mode="clip")
    tokens = Tokens(segments, order, jnp.maximum(positions, 0))
    return tokens, start, Tokens(cached, jnp.arange(cached.shape[1]), jnp.maximum(counts, 0))


def _embed(config, params, stack_params, ids, tokens: Tokens, types, ctx: Context, dtype) -> jax.Array:
    x = embed(params["tokens"], ids, ctx.at("tokens"))
    x = visit(stack_params, "after_embed", x, ctx, tokens)
    if config.max_positions:
        x = x + embed(params["positions"], tokens.positions + config.position_offset, ctx.at("positions"))
    if config.type_vocab_size:
        x = x + embed(params["types"], jnp.zeros_like(ids) if types is None else types, ctx.at("types"))
    if config.embed_norm:
        x = norm(config.norm, params["norm"], x, config.norm_eps, ctx.hidden)
    x = ctx.gated(dropout(x.astype(dtype), config.dropout, ctx.at("embed")))
    return ctx.place(x, ("batch", "length", "activation"))


def _bias(config: ModelConfig, params, queries: Tokens, keys: Tokens, causal: bool) -> jax.Array | None:
    """T5's relative position bias `[1 or batch, heads, queries, keys]`, float32, shared by all layers of a stack."""
    if not config.relative_buckets:
        return None
    distance = keys.order[..., None, :] - queries.order[..., :, None]
    bucket = relative_bucket(distance, causal, config.relative_buckets, config.relative_max_distance)
    values = embed(params["relative_positions"], bucket, Context())
    bias = jnp.moveaxis(values, -1, -3)
    return (bias if bias.ndim == 4 else bias[None]).astype(jnp.float32)


def empty_cache(
    config: ModelConfig, params: Mapping[str, Any], batch: int, length: int, dtype: Any = jnp.float32, source: int = 0
) -> dict[str, Any]:
    """A cache for `length` tokens of `batch` rows (and `source` encoder positions), by the runs of the parameters.

    Every row has a length of its own, int32 `[batch]`: its next tokens are written behind those that it has.
    """
    stacked = stack_params(params, "decoder/" if config.encoder_decoder else "")
    layers = config.decoder_layers() if config.encoder_decoder else config.layers()
    layer_map = config.decoder_layer_map if config.encoder_decoder else config.layer_map
    layer_cache = {}
    for run in runs(stacked, layers, layer_map):
        layer = layers[run.first]
        caches = {"attention": DenseCache.empty(batch, length, layer.kv_heads, layer.head_dim, dtype)}
        if layer.cross_heads:
            caches["cross_attention"] = DenseCache.empty(batch, source, layer.cross_heads, layer.head_dim, dtype)
        if run.length is not None:
            caches = jax.tree.map(lambda a, lead=run.length: jnp.broadcast_to(a, (lead, *a.shape)), caches)
        layer_cache[run.name] = caches
    cache = {
        "layers": layer_cache,
        "segments": jnp.zeros((batch, length), jnp.int32),
        "length": jnp.zeros(batch, jnp.int32),
    }
    return cache | {"source_segments": jnp.zeros((batch, source), jnp.int32)} if config.encoder_decoder else cache


class LanguageModel(linen.Module):
    """The network as a linen module: it declares the parameters and calls the pure forward pass.

    `LanguageModel(config).init(key, batch)["params"]` is `initialize(key, model_spec(config))`, leaf by leaf a linen
    parameter; `apply({"params": params}, batch)` is `forward(config, params, batch)`, for trees with Weights too.
    """

    config: ModelConfig

    @linen.compact
    def __call__(self, batch: Mapping[str, jax.Array], **options: Any) -> dict[str, Any]:
        spec = model_spec(self.config)
        if self.is_initializing():
            values = initialize(self.make_rng("params"), spec)
            params = {name: self.param(name, lambda _, value=values[name]: value) for name in spec}
        else:
            params = {name: self.get_variable("params", name) for name in spec}
        return forward(self.config, params, batch, **options)
