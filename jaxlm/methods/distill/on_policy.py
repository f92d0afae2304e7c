"""On-policy distillation: the student continues the data's texts, and the teacher judges what it wrote."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlm.core import Batch, Tree, row_columns
from jaxlm.losses.cross_entropy import IGNORED


class Generate(Protocol):
    """The student's sampling."""

    def __call__(
        self, params: Tree, prompts: Batch, key: jax.Array, new_tokens: int, /
    ) -> Int[Array, "batch new_tokens"]:
        """The tokens that follow every prompt, a row repeating its end once it is over."""


class Sampler(Protocol):
    """What makes a batch the student's own."""

    def __call__(self, params: Tree, batch: Batch, key: jax.Array, /) -> Batch:
        """The batch with texts that the student wrote, and a column `distill_mask`: the distillation mask."""


def on_policy(
    generate: Generate, *, ends: Sequence[int], encoder_decoder: bool, prompt: int = 16, share: float = 1.0
) -> Sampler:
    """`(params, batch, key) -> batch` in which, with probability `share`, all rows are what the student wrote.

    The labels of such rows are ignored (the student's text is no ground truth), and the distillation mask, a column
    `distill_mask`, marks where the teacher's answers are learned. What the student wrote is not differentiated. Source:
    Agarwal et al. 2023, GKD, arXiv:2306.13649, whose λ is `share`.

    Args:
      generate: the student's sampling.
      ends: the tokens that end a text.
      encoder_decoder: the student reads the row's source and writes the target; else it continues the row.
      prompt: tokens of a row that the student goes on from, those of the document that is running at their end; the
        student writes the rest of the row.
      share: probability that a step is the student's. The other steps are the data's.
    """
    if not 0 < share <= 1:
        raise ValueError(f"on_policy: share must be above 0 and at most 1, not {share}")
    if prompt < 1:
        raise ValueError(f"on_policy: a prompt of {prompt} tokens; a row needs at least 1 to begin with")

    def fn(params: Tree, batch: Batch, key: jax.Array) -> Batch:
        data = {**batch, "distill_mask": batch["labels"] != IGNORED}
        coin, key = jax.random.split(key)

        def written() -> Batch:
            if encoder_decoder:
                return jax.lax.stop_gradient(_answer(generate, params, data, key, ends=ends))
            return jax.lax.stop_gradient(_continue(generate, params, data, key, ends=ends, prompt=prompt))

        if share == 1.0:
            return written()
        return jax.lax.cond(jax.random.uniform(coin) < share, written, lambda: data)

    return fn


def _continue(
    generate: Generate, params: Tree, batch: Batch, key: jax.Array, *, ends: Sequence[int], prompt: int
) -> Batch:
    """Packed rows: the document that is running after `prompt` tokens goes on in the student's words."""
    ids, segments = batch["input_ids"], batch["segment_ids"]
    length = ids.shape[1]
    if prompt >= length:
        raise ValueError(
            f"on_policy: a prompt of {prompt} tokens leaves nothing to write in rows of {length}; shorten it"
        )
    running = (segments[:, :prompt] == segments[:, prompt - 1 : prompt]) & (segments[:, :prompt] > 0)
    running = running.astype(jnp.int32)
    prompts = {"input_ids": ids[:, :prompt], "attention_mask": running} | row_columns(batch)
    tokens = generate(params, prompts, key, length - prompt)
    real = jnp.concatenate([running, ~_is_over(tokens, ends)], axis=1).astype(jnp.int32)
    predicted = jnp.pad(real[:, 1:], ((0, 0), (0, 1))) > 0
    written = {
        "input_ids": jnp.concatenate([ids[:, :prompt], tokens], axis=1),
        "segment_ids": real,
        "positions": jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0),
        "labels": jnp.full_like(batch["labels"], IGNORED),
        "distill_mask": predicted & (jnp.arange(length) >= prompt - 1),
    }
    return _replace_rows(batch, running[:, -1] > 0, written)


def _answer(generate: Generate, params: Tree, batch: Batch, key: jax.Array, *, ends: Sequence[int]) -> Batch:
    """An encoder-decoder: a target by the student for every source, begun as the data begin theirs."""
    sources = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch} | row_columns(batch)
    tokens = generate(params, sources, key, batch["labels"].shape[1])
    real = ~_is_over(tokens, ends)
    written = {
        "decoder_input_ids": jnp.concatenate([batch["decoder_input_ids"][:, :1], tokens[:, :-1]], axis=1),
        "decoder_attention_mask": real.astype(jnp.int32),
        "labels": jnp.full_like(batch["labels"], IGNORED),
        "distill_mask": real,
    }
    return _replace_rows(batch, batch["distill_mask"].any(axis=1), written)


def _is_over(tokens: Int[Array, "batch length"], ends: Sequence[int]) -> Bool[Array, "batch length"]:
    """Whether a row is over at a position: after its first end."""
    is_end = jnp.isin(tokens, jnp.array(ends, jnp.int32)).astype(jnp.int32)
    return jnp.cumsum(is_end, axis=1) - is_end > 0


def _replace_rows(batch: Batch, rows: Bool[Array, "batch"], written: Batch) -> Batch:
    """The columns `written` in the chosen rows, the data in the rest (filler has no text to go on with)."""
    columns = {name: jnp.where(rows[:, None], a.astype(batch[name].dtype), batch[name]) for name, a in written.items()}
    return {**batch, **columns}
