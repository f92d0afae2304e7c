"""Task: how records become batches, outputs a loss, and predictions a score."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import Term, Terms
from jaxlm.data.loader import Batches, fitted
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.losses.cross_entropy import IGNORED, log_likelihood
from jaxlm.tasks.measure import Measure, agreement

Outputs = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


class Prepared(NamedTuple):
    """Encoded data of one split.

    Attributes:
      examples: the split's.
      facts: about it (`bytes` of text, say), which a score divides by.
      fitted_to: examples of all splits that share the lengths of padded batches, and so compiled programs; those that
        most is to be gained from first. Without any, the lengths fit this split.
    """

    examples: Examples
    facts: dict[str, int]
    fitted_to: tuple[Examples, ...] = ()

    def buckets(self, settings: DataSettings) -> tuple[int, ...]:
        """The lengths that batches are padded to: fitted to the first examples, and one more for longer ones."""
        first, *others = [each.lengths for each in self.fitted_to or (self.examples,)]
        found = fitted(first, settings.buckets, settings.max_length)
        longest = max([int(lengths.max(initial=0)) for lengths in others], default=0)
        return found if longest <= found[-1] else (*found, *fitted(np.array([longest]), 1, settings.max_length))


class Score(NamedTuple):
    """Metrics by name, and a table for people."""

    metrics: dict[str, float]
    report: str = ""


def no_labels(source: Source) -> tuple[str, ...]:
    """For tasks without classes."""
    return ()


def no_predictions(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """For tasks that sums of terms describe."""
    return {}


class Column(NamedTuple):
    """One array of a batch: a number a token (`[rows, length]`), or one a row; and its dtype."""

    per_token: bool = True
    dtype: Any = np.int32


PACKED = {name: Column() for name in ("input_ids", "segment_ids", "positions")}
PADDED = {name: Column() for name in ("input_ids", "attention_mask")}
DECODER = {name: Column() for name in ("decoder_input_ids", "decoder_attention_mask")}


def tokens_read(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Nats a row, and the likeliest token (or class) everywhere."""
    logits = outputs["logits"]
    likelihood, _ = log_likelihood(logits, batch["labels"])
    return {"nats": -likelihood.reshape(len(likelihood), -1).sum(axis=1), "predicted": logits.argmax(axis=-1)}


class Read(NamedTuple):
    """One batch of held-out data after a model has read it, on the host.

    Attributes:
      seen: what `Quality.read` gave; teacher: what it gave for the teacher, `None` where there is none.
      batch: what was read, labels included.
      tokenizer, labels: of the model.
    """

    seen: Mapping[str, np.ndarray]
    teacher: Mapping[str, np.ndarray] | None
    batch: Mapping[str, np.ndarray]
    tokenizer: Any
    labels: tuple[str, ...]


class Quality(NamedTuple):
    """What a report says of a task's models.

    Attributes:
      measures: the first is the quality that models are compared by, the others stand beside it.
      pieces: `Read -> {column: one number a piece}` of a batch; with a teacher also what the agreement adds up.
      same: the column that is equal for all models that read the same data.
      read: `(outputs, batch) -> {name: array [rows, ...]}`, `predicted` among them, inside the compiled forward pass.
      agreement: measure of equal predictions.
    """

    measures: tuple[Measure, ...]
    pieces: Callable[[Read], dict[str, np.ndarray]]
    same: str
    read: Callable[[Outputs, Batch], dict[str, jax.Array]] = tokens_read
    agreement: Measure = agreement


def token_pieces(read: Read) -> dict[str, np.ndarray]:
    """Every row that has something to predict: its nats and tokens, and on how many the teacher predicts the same."""
    known = counted(read.batch["labels"])
    rows = known.any(axis=1)
    found = {"nats": read.seen["nats"][rows], "tokens": known.sum(axis=1)[rows]}
    if read.teacher is None:
        return found
    agreed = ((read.seen["predicted"] == read.teacher["predicted"]) & known).sum(axis=1)
    return found | {"agreed": agreed[rows], "compared": found["tokens"]}


def batch_pieces(read: Read) -> dict[str, np.ndarray]:
    """The same of a whole batch: rows of running text follow each other, so they are no pieces of their own."""
    return {name: values.sum(keepdims=True) for name, values in token_pieces(read).items()}


class Task(NamedTuple):
    """One kind of training.

    Attributes:
      structure: fields of the model's config that the task decides: its `head`, and what that needs.
      prepare: `(source, tokenizer, labels, settings) -> Prepared`.
      batches: `(prepared, tokenizer, settings, batch_size, seed) -> Batches`; `seed` None: in order, each row once.
      loss: `(outputs, batch) -> terms`, what training minimises.
      measure: `(outputs, batch) -> terms`, what evaluation adds up.
      score: `(sums and weights of terms, predictions by row, labels, facts) -> Score`.
      quality: what a report measures.
      columns: the arrays of a batch.
      labels: `source -> names of the classes`, learned from training data.
      predict: `(outputs, batch) -> {name: array [batch, ...]}` that `score` reads on the host.
      unlabelled: `(source, tokenizer, settings) -> Examples` of texts without labels, with a column `scored` of where
        a teacher is heard; `None` for tasks that give no text or word a label.
      sentinels: `<extra_id_…>` tokens that a tokenizer trained for the task has.
    """

    structure: Mapping[str, Any]
    prepare: Callable[[Source, Any, tuple[str, ...], DataSettings], Prepared]
    batches: Callable[[Prepared, Any, DataSettings, int, int | None], Batches]
    loss: Callable[[Outputs, Batch], Terms]
    measure: Callable[[Outputs, Batch], Terms]
    score: Callable[[dict[str, Term], dict[str, np.ndarray], tuple[str, ...], Mapping[str, int]], Score]
    quality: Quality
    columns: Mapping[str, Column]
    labels: Callable[[Source], tuple[str, ...]] = no_labels
    predict: Callable[[Outputs, Batch], dict[str, jax.Array]] = no_predictions
    unlabelled: Callable[[Source, Any, DataSettings], Examples] | None = None
    sentinels: int = 0


def column(record: Mapping[str, Any], name: str, source: Source) -> Any:
    """A field of a record, or a ValueError that names the fields there are."""
    if name not in record:
        raise ValueError(
            f"{source.place} has no column {name!r}, only {', '.join(map(repr, record))}; "
            f"rename with {source.columns_field} = {{{name!r}: ...}}"
        )
    return record[name]


def documents_of(source: Source) -> Iterator[str]:
    """Every record's `text`, read as it is asked for; one that is no string is a bad row."""
    for row in source.located():
        text = column(row.record or {}, "text", source)
        if isinstance(text, str):
            yield text
        else:
            source.reject(row, f"the text {text!r} is {type(text).__name__}, not a string")


def texts_of(record: Mapping[str, Any], source: Source) -> tuple[str, ...]:
    """`(text,)`, or `(text, text_pair)` where records have both."""
    first = column(record, "text", source)
    return (first, record["text_pair"]) if "text_pair" in record else (first,)


def with_unlabelled(labelled: Examples, unlabelled: Examples) -> Examples:
    """Examples with labels, and behind them those without; the column `scored` says where a teacher is heard.

    Args:
      labelled: with a column `labels`: a class or a number a row, or a class a token.
      unlabelled: what a model reads, and instead of `labels` a `scored` of 0 and 1. Where samples have a `weight`, and
        one side has none, there it is 1.

    Raises:
      ValueError: where only one side is of pairs of texts.
    """
    pairs = ["token_type_ids" in each.columns for each in (labelled, unlabelled)]
    if pairs[0] != pairs[1]:
        having, lacking = ("the training data", "these texts") if pairs[0] else ("these texts", "the training data")
        raise ValueError(f"config.data.unlabelled: {having} have a column text_pair, {lacking} have none")
    labels, heard = labelled.columns["labels"], unlabelled.columns["scored"]
    values = labels.values if isinstance(labels, Ragged) else labels
    nothing = np.nan if values.dtype.kind == "f" else IGNORED
    blank = np.full(len(heard.values if isinstance(heard, Ragged) else heard), nothing, values.dtype)

    def like(column: Ragged | np.ndarray, values: np.ndarray) -> Ragged | np.ndarray:
        return Ragged(values, column.offsets) if isinstance(column, Ragged) else values

    own = {**labelled.columns, "scored": like(labels, counted(values).astype(np.int32))}
    more = {**unlabelled.columns, "labels": like(heard, blank)}
    if "weight" in own or "weight" in more:
        own.setdefault("weight", np.ones(len(labelled), np.float32))
        more.setdefault("weight", np.ones(len(unlabelled), np.float32))
    return Examples(own).then(Examples(more))


def sample_weights(records: Sequence[Mapping[str, Any]], source: Source) -> dict[str, np.ndarray]:
    """The column `weight` float32 `[samples]`, where the data have one: what a distillation may weigh its samples by.

    Raises:
      ValueError: for a weight that is missing, negative or no number.
    """
    if not any("weight" in record for record in records):
        return {}
    values = [record.get("weight") for record in records]
    try:
        weights = np.array(values, np.float32)
    except (TypeError, ValueError):
        weights = np.array(np.nan)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            f"{source.place}: the column 'weight' must hold a number of 0 or more in every row; correct it, or "
            f"select the columns to read with {source.columns_field}"
        )
    return {"weight": weights}


def scalar(terms: Mapping[str, Any], name: str) -> float:
    """`sum / weight` on the host."""
    return float(terms[name].sum) / max(float(terms[name].weight), 1e-9)


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several batches, padded to the longest with the ignored label."""
    width = max((p.shape[1] for p in parts if p.ndim > 1), default=0)
    return np.concatenate(
        [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-100) if p.ndim > 1 else p for p in parts]
    )
