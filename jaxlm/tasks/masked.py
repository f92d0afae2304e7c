"""Masked language modelling, with next-sentence prediction where the model has a head for it."""

import re
from array import array
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Terms
from jaxlm.data.corruption import mask_tokens, next_sentence_pairs
from jaxlm.data.encoding import encode, special_tokens_around
from jaxlm.data.loader import Batches, bucketed, in_order, packed
from jaxlm.data.ragged import Examples, Ragged, offsets_of
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy
from jaxlm.tasks.language_modeling import REPORTED, TOKEN_METRICS, batch_examples, row_sums, token_loss, token_read
from jaxlm.tasks.metrics import Columns, loss, pair_accuracy, perplexity
from jaxlm.tasks.task import (
    PACKED,
    PADDED,
    Batch,
    BatchPredictions,
    Column,
    EvalSpec,
    Outputs,
    Prepared,
    Task,
    documents_of,
    only,
)


def framed(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """Documents between the tokenizer's first and last special tokens."""
    first, last = special_tokens_around(tokenizer)
    ids = encode(tokenizer, documents_of(source), special_tokens=False, before=first, after=last).ids
    return Prepared(Examples({"input_ids": ids}), {})


def sentence_pairs(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """Pairs of passages for next-sentence prediction; a sentence ends at `.`, `!`, `?` or a line's end."""
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(
            "the tokenizer has no tokens to begin and part a pair (cls_token, sep_token); next-sentence prediction "
            "needs them (wordpiece:SIZE has)"
        )
    counts = array("q")

    def sentences() -> Iterator[str]:
        for text in documents_of(source):
            parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]
            counts.append(len(parts))
            yield from parts

    ids = encode(tokenizer, sentences(), special_tokens=False).ids
    return Prepared(
        next_sentence_pairs(
            ids,
            offsets_of(np.array(counts, np.int64)),
            seed=0,
            max_length=settings.max_length,
            first_id=tokenizer.cls_token_id,
            between_id=tokenizer.sep_token_id,
        ),
        {},
    )


def masked_batches(
    prepared: Prepared, tokenizer: Any, settings: DataSettings, batch_size: int, seed: int | None
) -> Batches:
    """Packed rows (or padded pairs), 15% of their tokens hidden anew at every step; evaluation hides the same ones."""
    examples, pad = prepared.examples, padding_id(tokenizer)
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; masked language modelling needs one (wordpiece:SIZE has)")
    if "next_sentence_labels" in examples.columns:
        lengths = prepared.buckets(settings)
        if seed is None:
            batches = in_order(examples, batch_size, lengths=lengths, pad_id=pad)
        else:
            batches = bucketed(examples, batch_size, seed, lengths=lengths, pad_id=pad)
    else:
        ids = examples.columns["input_ids"]
        assert isinstance(ids, Ragged)
        batches = packed(ids, batch_size, seed, length=settings.max_length, pad_id=pad)
    special = np.array(tokenizer.all_special_ids, np.int32)
    return mask_tokens(
        batches, seed or 0, mask_id=tokenizer.mask_token_id, vocab_size=len(tokenizer), special_ids=special
    )


def pair_loss(outputs: Outputs, batch: Batch) -> Terms:
    """Cross-entropy of the hidden tokens, plus that of the pair."""
    pair = cross_entropy(outputs["next_sentence_logits"], batch["next_sentence_labels"])
    return token_loss(outputs, batch) | {"next_sentence": pair}


def pair_read(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """As `token_read`, with the likelier class of every pair, int32 `[rows]`."""
    return token_read(outputs, batch) | {"pair": jnp.argmax(outputs["next_sentence_logits"], axis=-1)}


def pair_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """Every pair: what is known of its hidden tokens, of which a short one may have none, and whether it is right."""
    true = predictions.batch["next_sentence_labels"]
    pairs = true != IGNORED
    columns = row_sums(predictions) | {"pairs": pairs.astype(np.int32), "pairs_right": predictions.read["pair"] == true}
    return {name: values[pairs] for name, values in columns.items()}


def pairs_with_hidden_tokens(columns: Columns) -> Columns:
    """What a report, which is of the tokens, stores."""
    return {name: values[columns["tokens"] > 0] for name, values in only(*REPORTED)(columns).items()}


masked = Task(
    structure={"head": "masked"},
    prepare=framed,
    batches=masked_batches,
    loss=token_loss,
    evaluation=EvalSpec(
        metrics=TOKEN_METRICS,
        compared=(loss, perplexity),
        read=token_read,
        examples=batch_examples,
        same="tokens",
        reported=only(*REPORTED),
        agreement_only=("predicted",),
    ),
    columns={**PACKED, "labels": Column()},
)
next_sentence = Task(
    structure={"head": "masked", "next_sentence": True},
    prepare=sentence_pairs,
    batches=masked_batches,
    loss=pair_loss,
    evaluation=EvalSpec(
        metrics={**TOKEN_METRICS, "next_sentence_accuracy": pair_accuracy},
        compared=(loss, perplexity),
        read=pair_read,
        examples=pair_examples,
        same="tokens",
        reported=pairs_with_hidden_tokens,
        agreement_only=("predicted",),
    ),
    columns={
        **PADDED,
        "token_type_ids": Column(),
        "labels": Column(),
        "next_sentence_labels": Column(per_token=False),
    },
)
