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
from jaxlm.tasks.language_modeling import (
    REPORTED,
    TOKEN_METRICS,
    batch_examples,
    token_examples,
    token_loss,
    token_read,
)
from jaxlm.tasks.metrics import loss, perplexity
from jaxlm.tasks.task import (
    DECODER,
    PADDED,
    Column,
    EvalSpec,
    Prepared,
    Task,
    documents_of,
    only,
    sample_weights,
    text_of,
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
    source_texts, target_texts, weights = zip(*rows, strict=True)
    inputs, targets = (with_end_token(texts, tokenizer, settings.max_length) for texts in (source_texts, target_texts))
    shifted = Ragged(np.empty_like(targets.values), targets.offsets)
    shifted.values[1:] = targets.values[:-1]
    shifted.values[targets.offsets[:-1]] = padding_id(tokenizer)
    columns: dict[str, Any] = {"input_ids": inputs, "decoder_input_ids": shifted, "labels": targets}
    return Prepared(Examples(columns | sample_weights(weights)), {})


def with_end_token(texts: Iterable[str], tokenizer: Any, max_length: int | None = None) -> Ragged:
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
    return Prepared(Examples({"input_ids": with_end_token(documents_of(source), tokenizer)}), {})


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
EVALUATION = EvalSpec(
    metrics=TOKEN_METRICS,
    compared=(loss, perplexity),
    read=token_read,
    examples=token_examples,
    same="tokens",
    reported=only(*REPORTED),
    agreement_only=("predicted",),
)

seq2seq = Task(
    structure={"head": "seq2seq"},
    prepare=pairs,
    batches=padded_batches,
    loss=token_loss,
    evaluation=EVALUATION,
    columns=COLUMNS,
)
denoising = Task(
    structure={"head": "seq2seq"},
    prepare=plain,
    batches=denoising_batches,
    loss=token_loss,
    evaluation=EVALUATION._replace(examples=batch_examples),
    columns=COLUMNS,
    sentinels=100,  # as T5's own tokenizer
)
