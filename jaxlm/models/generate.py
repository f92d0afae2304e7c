"""Autoregressive generation with a key/value cache."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.models.config import ModelConfig
from jaxlm.models.transformer import check_length, empty_cache, forward


def sample(
    key: jax.Array, logits: jax.Array, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> jax.Array:
    """One token a row: int32 `[batch]` from logits `[batch, vocab]`.

    `temperature` 0 is greedy. `top_k` keeps the k most likely tokens; `top_p` the smallest set of most likely tokens
    whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751).

    >>> sample(jax.random.key(0), jnp.array([[0.0, 3.0, 1.0]]), temperature=0.0).tolist()
    [1]
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        probabilities = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a setting that would choose among no token at all."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} keeps no token; None keeps all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is no probability above 0; None keeps all tokens")


@partial(jax.jit, static_argnames=("config", "new_tokens", "temperature", "top_k", "top_p", "stop", "dtype"))
def generate(
    config: ModelConfig,
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Continues every row of `batch`: int32 `[batch, new_tokens]`; after `stop` a row repeats `stop`.

    The prompt runs once and fills the cache; each further token is one cached step. Prompts of unequal length are
    padded on the left (`attention_mask` 0 there), so that every row goes on at the same place. An encoder-decoder reads
    `input_ids` and begins with `config.decoder_start_token_id`.
    """
    rows, length = batch["input_ids"].shape
    check_sampling(temperature, top_k, top_p)
    check_length(config, 0 if config.encoder_decoder else length + new_tokens - 1)
    if config.encoder_decoder:
        if config.decoder_start_token_id is None:
            raise ValueError("generation needs config.decoder_start_token_id")
        first = jnp.full((rows, 1), config.decoder_start_token_id, jnp.int32)
        cache = empty_cache(config, params, rows, 1 + new_tokens, dtype, source=length)
        outputs = forward(config, params, {**batch, "decoder_input_ids": first}, cache=cache, dtype=dtype)
    else:
        cache = empty_cache(config, params, rows, length + new_tokens, dtype)
        outputs = forward(config, params, batch, cache=cache, dtype=dtype)

    def choose(logits, done, key):
        token = sample(key, logits[:, -1], temperature, top_k, top_p)
        if stop is None:
            return token, done
        token = jnp.where(done, stop, token)
        return token, done | (token == stop)

    def step(carry, key):
        token, done, cache = carry
        name = "decoder_input_ids" if config.encoder_decoder else "input_ids"
        out = forward(config, params, {name: token[:, None]}, cache=cache, dtype=dtype)
        token, done = choose(out["logits"], done, key)
        return (token, done, out["cache"]), token

    keys = jax.random.split(key, new_tokens)
    token, done = choose(outputs["logits"], jnp.zeros(rows, bool), keys[0])
    _, rest = jax.lax.scan(step, (token, done, outputs["cache"]), keys[1:])
    return jnp.concatenate([token[:, None], rest.T], axis=1)
