"""Causal language modelling on packed documents; also what every language-modelling task shares."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.core import Term, Terms
from jaxlm.data.encoding import encode
from jaxlm.data.loader import Batches, packed
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import accuracy, cross_entropy
from jaxlm.tasks.metrics import bits_per_byte, perplexity
from jaxlm.tasks.task import (
    PACKED,
    Batch,
    BatchPredictions,
    Column,
    EvalSpec,
    Outputs,
    Prepared,
    Score,
    Task,
    batch_pieces,
    documents_of,
    scalar,
)


def documents(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """Every record's `text`, between the tokenizer's begin and end tokens where it has them, and the bytes of them all.

    Of texts that a model is measured on there is a column of the bytes behind every token. With a begin token the first
    token of a document is predicted too, so the loss accounts for every byte.
    """
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for text in documents_of(source):
            size += len(text.encode("utf8"))
            yield text

    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    counted = source.evaluated
    found = encode(tokenizer, texts(), special_tokens=False, before=first, after=last, count_bytes=counted)
    columns = {"input_ids": found.ids} | ({"bytes": found.bytes} if counted else {})
    return Prepared(Examples(columns), {"bytes": size})


def packed_batches(
    prepared: Prepared, tokenizer: Any, settings: DataSettings, batch_size: int, seed: int | None
) -> Batches:
    """Rows of exactly `max_length` tokens, where they are evaluated with the bytes of what is to be predicted."""
    ids, sizes = prepared.examples.columns["input_ids"], prepared.examples.columns.get("bytes")
    assert isinstance(ids, Ragged) and (sizes is None or isinstance(sizes, Ragged))
    return packed(ids, batch_size, seed, length=settings.max_length, pad_id=padding_id(tokenizer), sizes=sizes)


def token_loss(outputs: Outputs, batch: Batch) -> Terms:
    """Cross-entropy a predicted token."""
    return {"cross_entropy": cross_entropy(outputs["logits"], batch["labels"])}


def token_measures(outputs: Outputs, batch: Batch) -> Terms:
    """Cross-entropy and accuracy over the predicted tokens."""
    return token_loss(outputs, batch) | {"accuracy": accuracy(outputs["logits"], batch["labels"])}


def text_measures(outputs: Outputs, batch: Batch) -> Terms:
    """As `token_measures`, and where the bytes behind the labels are known, the bits for every byte."""
    terms = token_measures(outputs, batch)
    if "bytes" not in batch:
        return terms
    bits, size = terms["cross_entropy"].sum / math.log(2), batch["bytes"].sum().astype(jnp.float32)
    return terms | {"bits_per_byte": Term(bits, size)}


def token_score(
    terms: dict[str, Term], predictions: dict[str, np.ndarray], labels: tuple[str, ...], facts: Mapping[str, int]
) -> Score:
    """Loss in nats a token, perplexity, accuracy; of running text also bits a byte, which compares tokenizers."""
    loss = scalar(terms, "cross_entropy")
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "accuracy": scalar(terms, "accuracy")}
    if "bits_per_byte" in terms and terms["bits_per_byte"].weight > 0:
        metrics["bits_per_byte"] = scalar(terms, "bits_per_byte")
    return Score(metrics)


def text_pieces(read: BatchPredictions) -> dict[str, np.ndarray]:
    """As `batch_pieces`, with the UTF-8 bytes of the text that was predicted."""
    return batch_pieces(read) | {"bytes": read.batch["bytes"].sum(keepdims=True).ravel()}


causal = Task(
    {"head": "causal"},
    documents,
    packed_batches,
    token_loss,
    text_measures,
    token_score,
    EvalSpec((bits_per_byte, perplexity), text_pieces, same="bytes"),
    {**PACKED, "labels": Column()},
)
