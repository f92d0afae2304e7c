"""Causal language modelling on packed documents; also what every language-modelling task shares."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Terms
from jaxlm.data.encoding import encode
from jaxlm.data.loader import Batches, packed
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import cross_entropy, log_likelihood
from jaxlm.tasks.metrics import Metric, bits_per_byte, loss, perplexity, token_accuracy
from jaxlm.tasks.task import (
    PACKED,
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
    evaluated = source.evaluated
    encoded = encode(tokenizer, texts(), special_tokens=False, before=first, after=last, count_bytes=evaluated)
    columns = {"input_ids": encoded.ids} | ({"bytes": encoded.bytes} if evaluated else {})
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


def token_read(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Nats (float32) and right tokens of a row, `[rows]`; the likeliest token everywhere, int32 `[rows, length]`."""
    logits, labels = outputs["logits"], batch["labels"]
    likelihood, valid = log_likelihood(logits, labels)
    predicted = jnp.argmax(logits, axis=-1)
    right = (predicted == labels) & (valid > 0)
    return {"nats": -likelihood.sum(axis=1), "right": right.sum(axis=1), "predicted": predicted}


def row_sums(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """Every row: its nats, tokens to predict and right ones, and on how many the teacher predicts the same."""
    valid, read = counted(predictions.batch["labels"]), predictions.read
    tokens = valid.sum(axis=1)
    columns = {"nats": read["nats"].astype(np.float64), "tokens": tokens, "right": read["right"]}
    if predictions.teacher is None:
        return columns
    agreed = ((read["predicted"] == predictions.teacher["predicted"]) & valid).sum(axis=1)
    return columns | {"agreed": agreed, "compared": tokens}


def token_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """Every row that has something to predict is an example."""
    columns = row_sums(predictions)
    return {name: values[columns["tokens"] > 0] for name, values in columns.items()}


def batch_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """A whole batch is an example: rows of running text follow each other, and are none of their own."""
    return {name: values.sum(keepdims=True) for name, values in row_sums(predictions).items()}


def text_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """As `batch_examples`, with the UTF-8 bytes of the text that was predicted where they are known."""
    columns, batch = batch_examples(predictions), predictions.batch
    return columns | ({"bytes": batch["bytes"].sum(keepdims=True).ravel()} if "bytes" in batch else {})


TOKEN_METRICS: dict[str, Metric] = {"loss": loss, "perplexity": perplexity, "accuracy": token_accuracy}
"""Loss in nats a token, perplexity, accuracy."""
REPORTED = ("nats", "tokens", "agreed", "compared")

causal = Task(
    structure={"head": "causal"},
    prepare=documents,
    batches=packed_batches,
    loss=token_loss,
    evaluation=EvalSpec(
        metrics={**TOKEN_METRICS, "bits_per_byte": bits_per_byte},  # the last compares tokenizers
        compared=(bits_per_byte, perplexity),
        read=token_read,
        examples=text_examples,
        same="bytes",
        reported=only(*REPORTED, "bytes"),
        agreement_only=("predicted",),
    ),
    columns={**PACKED, "labels": Column()},
)
