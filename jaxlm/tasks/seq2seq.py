"""Sequence to sequence: supervised pairs, and T5's span denoising of plain text."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxlm.data.corruption import denoise_spans, denoising_length
from jaxlm.data.encoding import encode
from jaxlm.data.loader import Batches, bucketed, in_order, packed
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id, sentinel_ids
from jaxlm.tasks.language_modeling import token_loss, token_measures, token_score
from jaxlm.tasks.metrics import loss, perplexity
from jaxlm.tasks.task import (
    DECODER,
    PADDED,
    Column,
    EvalSpec,
    Prepared,
    Task,
    batch_pieces,
    documents_of,
    sample_weights,
    text_of,
    token_pieces,
    weight_of,
)


def pairs(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`source` and `target` of every record; the decoder reads the target shifted right, from the pad token."""
    rows = list(
        source.usable(
            lambda r: (text_of(r, "source", source), text_of(r, "target", source), weight_of(r, source)),
            optional=("weight",),
        )
    )
    sources, wanted, weights = zip(*rows, strict=True)
    inputs, targets = (ended(texts, tokenizer, settings.max_length) for texts in (sources, wanted))
    shifted = Ragged(np.empty_like(targets.values), targets.offsets)
    shifted.values[1:] = targets.values[:-1]
    shifted.values[targets.offsets[:-1]] = padding_id(tokenizer)
    columns: dict[str, Any] = {"input_ids": inputs, "decoder_input_ids": shifted, "labels": targets}
    return Prepared(Examples(columns | sample_weights(weights)), {})


def ended(texts: Iterable[str], tokenizer: Any, max_length: int | None = None) -> Ragged:
    """Encoded texts that end with the end token, whether the tokenizer adds it (T5's does) or not."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token (eos_token), without which a decoder never learns to stop")
    room = None if max_length is None else max_length - 1
    return encode(tokenizer, texts, max_length=room, special_tokens=False, after=[end]).ids


def padded_batches(
    prepared: Prepared, tokenizer: Any, settings: DataSettings, batch_size: int, seed: int | None
) -> Batches:
    """Rows of similar length, padded to the smallest bucket."""
    lengths, pad = prepared.buckets(settings), padding_id(tokenizer)
    if seed is None:
        return in_order(prepared.examples, batch_size, lengths=lengths, pad_id=pad)
    return bucketed(prepared.examples, batch_size, seed, lengths=lengths, pad_id=pad)


def plain(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """Every record's `text`, ended by the end token."""
    return Prepared(Examples({"input_ids": ended(documents_of(source), tokenizer)}), {})


def denoising_batches(
    prepared: Prepared, tokenizer: Any, settings: DataSettings, batch_size: int, seed: int | None
) -> Batches:
    """Rows of text whose corrupted form is at most `max_length` tokens, the spans drawn anew at every step."""
    ids = prepared.examples.columns["input_ids"]
    assert isinstance(ids, Ragged)
    length = denoising_length(settings.max_length).length
    rows = packed(ids, batch_size, seed, length=length, pad_id=padding_id(tokenizer))
    return denoise_spans(
        rows,
        seed or 0,
        sentinels=sentinel_ids(tokenizer),
        end_id=tokenizer.eos_token_id,
        pad_id=padding_id(tokenizer),
    )


COLUMNS = {**PADDED, **DECODER, "labels": Column()}
seq2seq = Task(
    {"head": "seq2seq"},
    pairs,
    padded_batches,
    token_loss,
    token_measures,
    token_score,
    EvalSpec((loss, perplexity), token_pieces, same="tokens"),
    COLUMNS,
)
denoising = Task(
    {"head": "seq2seq"},
    plain,
    denoising_batches,
    token_loss,
    token_measures,
    token_score,
    EvalSpec((loss, perplexity), batch_pieces, same="tokens"),
    COLUMNS,
    sentinels=100,  # as T5's own tokenizer
)
