"""Autoregressive generation with a key/value cache."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import row_columns
from jaxlm.models.config import ModelConfig
from jaxlm.models.heads import last_token
from jaxlm.models.transformer import check_length, empty_cache, forward


def sample(
    key: jax.Array, logits: jax.Array, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> jax.Array:
    """Samples one token per row: int32 `[batch]` from logits `[batch, vocab]`.

    `temperature` 0 is greedy. `top_k` keeps the k most likely tokens; `top_p` the smallest set of most likely tokens
    with a probability of at least p (Holtzman et al. 2020, arXiv:1904.09751).

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
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        probabilities = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a setting that leaves no token to sample from."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} keeps no token; None keeps all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1; None keeps all tokens")


def stop_ids(stop: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a row, given as one id, several, or `None`.

    >>> stop_ids([2, 7, 2], 10), stop_ids(3, 10), stop_ids(None, 10)
    ((2, 7), (3,), ())

    Raises:
      ValueError: for anything that is not an id of the vocabulary.
    """
    stop = np.asarray(stop).tolist() if hasattr(stop, "__array__") else stop
    several = isinstance(stop, Iterable) and not isinstance(stop, str | bytes | Mapping)
    ids = tuple(stop) if several else () if stop is None else (stop,)
    for stop_id in ids:
        if not isinstance(stop_id, int | np.integer) or isinstance(stop_id, bool) or not 0 <= stop_id < vocab_size:
            raise ValueError(
                f"stop {stop!r}: {stop_id!r} is no id of a token; give one id from 0 to {vocab_size - 1}, several, or "
                "None to generate all new tokens"
            )
    return tuple(dict.fromkeys(map(int, ids)))


def pad_after_strings(tokens: np.ndarray, strings: Sequence[str], tokenizer: Any, pad_id: int) -> np.ndarray:
    """New tokens `[batch, length]`, padded after the token that completes one of `strings` in the decoded text."""
    tokens = tokens.copy()
    for row in tokens:
        for size in range(1, len(row)):
            text = tokenizer.decode(row[:size], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if any(string in text for string in strings):
                row[size:] = pad_id
                break
    return tokens


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
    stop: Any = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Continues every row of `batch`: int32 `[batch, new_tokens]`; a row that reaches an id in `stop` repeats it.

    The prompt runs once and fills the cache; each further token is one cached step. Prompts of unequal length are
    padded on either side (`attention_mask` 0): every row continues after its last real token. A packed row
    (`segment_ids`) continues its last document. An encoder-decoder reads `input_ids` and begins with
    `config.decoder_start_token_id`. Columns `rows/…` go with the prompt and with every step.

    Args:
      stop: an id, several (in a list, a tuple or an array), or `None`.

    Raises:
      ValueError: for sampling settings that leave no token, or more tokens than the model has positions.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens {new_tokens}: at least 1")
    check_sampling(temperature, top_k, top_p)
    stop = stop_ids(stop, config.vocab_size)
    return _generate(config, params, batch, key, new_tokens, temperature, top_k, top_p, stop, jnp.dtype(dtype))


@partial(jax.jit, static_argnames=("config", "new_tokens", "temperature", "top_k", "top_p", "stop", "dtype"))
def _generate(config, params, batch, key, new_tokens, temperature, top_k, top_p, stop, dtype) -> jax.Array:
    prompt_outputs = _prefill(config, params, batch, new_tokens, dtype)
    rows, columns = batch["input_ids"].shape[0], row_columns(batch)
    stop_tokens = jnp.array(stop, jnp.int32)

    def choose(logits, previous, done, key):
        token = jnp.where(done, previous, sample(key, logits[:, -1], temperature, top_k, top_p))
        return token, done | jnp.isin(token, stop_tokens)

    def step(carry, key):
        token, done, cache = carry
        name = "decoder_input_ids" if config.encoder_decoder else "input_ids"
        out = forward(config, params, {name: token[:, None], **columns}, cache=cache, dtype=dtype)
        token, done = choose(out["logits"], token, done, key)
        return (token, done, out["cache"]), token

    keys = jax.random.split(key, new_tokens)
    token, done = choose(prompt_outputs["logits"], jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), keys[0])
    _, rest = jax.lax.scan(step, (token, done, prompt_outputs["cache"]), keys[1:])
    return jnp.concatenate([token[:, None], rest.T], axis=1)


def _prefill(config, params, batch, new_tokens, dtype) -> dict[str, Any]:
    """The outputs at the last token of every prompt, and a cache that holds the prompts and has room for new tokens."""
    rows, length = batch["input_ids"].shape
    check_length(config, 0 if config.encoder_decoder else length + new_tokens - 1)
    if config.encoder_decoder:
        if config.decoder_start_token_id is None:
            raise ValueError("generation needs a decoder_start_token_id; set it in the model's config")
        first = jnp.full((rows, 1), config.decoder_start_token_id, jnp.int32)
        cache = empty_cache(config, params, rows, 1 + new_tokens, dtype, source=length)
        source = {name: array for name, array in batch.items() if not name.startswith("decoder_")}
        return forward(config, params, {**source, "decoder_input_ids": first}, cache=cache, dtype=dtype)
    cache = empty_cache(config, params, rows, length + new_tokens, dtype)
    segments = batch.get("segment_ids", batch.get("attention_mask", jnp.ones((rows, length), jnp.int32)))
    last = last_token(segments)
    in_last_segment = (segments == jnp.take_along_axis(segments, last[:, None], axis=1)) & (segments > 0)
    prompt = {name: array for name, array in batch.items() if name in ("input_ids", "token_type_ids")}
    prompt["attention_mask"] = in_last_segment.astype(jnp.int32)
    return forward(config, params, prompt | row_columns(batch), cache=cache, head_at=last, dtype=dtype)
