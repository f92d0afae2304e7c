"""On-policy distillation: the student continues the data's texts, and the teacher judges what it wrote."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Tree
from jaxlm.losses.cross_entropy import IGNORED

Batch = dict[str, jax.Array]
Generate = Callable[[Tree, Batch, jax.Array, int], jax.Array]
"""`(params, prompts, key, new tokens) -> tokens [batch, new tokens]`, a row repeating its end once it is over."""


def on_policy(
    generate: Generate, *, ends: Sequence[int], encoder_decoder: bool, prompt: int = 16, share: float = 1.0
) -> Callable[[Tree, Batch, jax.Array], Batch]:
    """`(params, batch, key) -> batch` in which, with probability `share`, all rows are what the student wrote.

    The labels of such rows are ignored (the student's own text is no truth), and a column `scored` says where the
    teacher's answers are learned. What the student wrote is not differentiated. Source: Agarwal et al. 2023, GKD,
    arXiv:2306.13649, whose λ is `share`.

    Args:
      generate: the student's sampling.
      ends: the tokens that end a text.
      encoder_decoder: the student reads the row's source and writes the target; else it continues the row.
      prompt: tokens of a row that are given, those of the document that is running at their end; the student writes the
        rest of the row.
      share: probability that a step is the student's. The other steps are the data's.
    """
    if not 0 < share <= 1:
        raise ValueError(f"on_policy: share must be above 0 and at most 1, not {share}")
    if prompt < 1:
        raise ValueError(f"on_policy: a prompt of {prompt} tokens; a row needs at least 1 to begin with")
    write = _answer if encoder_decoder else _continue

    def fn(params: Tree, batch: Batch, key: jax.Array) -> Batch:
        given = batch | {"scored": batch["labels"] != IGNORED}
        coin, key = jax.random.split(key)
        written = lambda: jax.lax.stop_gradient(write(generate, params, given, key, ends, prompt))  # noqa: E731
        if share == 1.0:
            return written()
        return jax.lax.cond(jax.random.uniform(coin) < share, written, lambda: given)

    return fn


def _continue(generate: Generate, params: Tree, batch: Batch, key: jax.Array, ends: Any, prompt: int) -> Batch:
    """Packed rows: the document that is running after `prompt` tokens goes on in the student's words."""
    ids, segments = batch["input_ids"], batch["segment_ids"]
    length = ids.shape[1]
    if prompt >= length:
        raise ValueError(
            f"on_policy: a prompt of {prompt} tokens leaves nothing to write in rows of {length}; shorten it"
        )
    running = (segments[:, :prompt] == segments[:, prompt - 1 : prompt]) & (segments[:, :prompt] > 0)
    running = running.astype(jnp.int32)
    tokens = generate(params, {"input_ids": ids[:, :prompt], "attention_mask": running}, key, length - prompt)
    real = jnp.concatenate([running, ~_over(tokens, ends)], axis=1).astype(jnp.int32)
    predicted = jnp.pad(real[:, 1:], ((0, 0), (0, 1))) > 0
    new = {
        "input_ids": jnp.concatenate([ids[:, :prompt], tokens], axis=1),
        "segment_ids": real,
        "positions": jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0),
        "labels": jnp.full_like(batch["labels"], IGNORED),
        "scored": predicted & (jnp.arange(length) >= prompt - 1),
    }
    return _where(running[:, -1] > 0, new, batch)


def _answer(generate: Generate, params: Tree, batch: Batch, key: jax.Array, ends: Any, prompt: int) -> Batch:
    """An encoder-decoder: the student's own target for every source, begun as the data begin theirs."""
    sources: Batch = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    tokens = generate(params, sources, key, batch["labels"].shape[1])
    real = ~_over(tokens, ends)
    new = {
        "decoder_input_ids": jnp.concatenate([batch["decoder_input_ids"][:, :1], tokens[:, :-1]], axis=1),
        "decoder_attention_mask": real.astype(jnp.int32),
        "labels": jnp.full_like(batch["labels"], IGNORED),
        "scored": real,
    }
    return _where(batch["scored"].any(axis=1), new, batch)


def _over(tokens: jax.Array, ends: Sequence[int]) -> jax.Array:
    """Where a row is over: after its first end."""
    met = jnp.isin(tokens, jnp.array(ends, jnp.int32)).astype(jnp.int32)
    return jnp.cumsum(met, axis=1) - met > 0


def _where(rows: jax.Array, new: Batch, batch: Batch) -> Batch:
    """`new` in the chosen rows, the data in the others (filler has no text to go on with)."""
    chosen = {name: jnp.where(rows[:, None], a.astype(batch[name].dtype), batch[name]) for name, a in new.items()}
    return batch | chosen
