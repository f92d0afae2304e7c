"""Masked language modelling, with next-sentence prediction where the model has a head for it."""

import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.core import Terms
from jaxlm.data.corruption import mask_tokens, next_sentence_pairs
from jaxlm.data.encoding import encode, frame
from jaxlm.data.loader import Batches, bucketed, in_order, packed
from jaxlm.data.ragged import Examples, Ragged, offsets_of
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import accuracy, cross_entropy
from jaxlm.tasks.language_modeling import token_loss, token_measures, token_score
from jaxlm.tasks.metrics import loss, perplexity
from jaxlm.tasks.task import (
    PACKED,
    PADDED,
    Batch,
    Column,
    EvalSpec,
    Outputs,
    Prepared,
    Task,
    batch_pieces,
    documents_of,
    token_pieces,
)


def framed(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """Documents between the tokenizer's first and last special tokens."""
    first, last = frame(tokenizer)
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


def pair_measures(outputs: Outputs, batch: Batch) -> Terms:
    """Both losses and both accuracies."""
    pair = accuracy(outputs["next_sentence_logits"], batch["next_sentence_labels"])
    return pair_loss(outputs, batch) | token_measures(outputs, batch) | {"next_sentence_accuracy": pair}


def pair_score(terms, predictions, labels, facts):
    """As `token_score`, with the accuracy of the pair."""
    score = token_score(terms, predictions, labels, facts)
    pair = terms["next_sentence_accuracy"]
    return score._replace(metrics=score.metrics | {"next_sentence_accuracy": float(pair.sum) / float(pair.weight)})


masked = Task(
    {"head": "masked"},
    framed,
    masked_batches,
    token_loss,
    token_measures,
    token_score,
    EvalSpec((loss, perplexity), batch_pieces, same="tokens"),
    {**PACKED, "labels": Column()},
)
next_sentence = Task(
    {"head": "masked", "next_sentence": True},
    sentence_pairs,
    masked_batches,
    pair_loss,
    pair_measures,
    pair_score,
    EvalSpec((loss, perplexity), token_pieces, same="tokens"),
    {**PADDED, "token_type_ids": Column(), "labels": Column(), "next_sentence_labels": Column(per_token=False)},
)
