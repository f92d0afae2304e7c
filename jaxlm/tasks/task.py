"""Task: how records become batches, outputs a loss, and predictions a score."""

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import Term, Terms
from jaxlm.data.loader import Batches, fitted
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Record, Source, Unusable
from jaxlm.losses.cross_entropy import IGNORED, log_likelihood
from jaxlm.tasks.metrics import Metric, agreement

Outputs = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


class Prepared(NamedTuple):
    """Encoded data of one split.

    Attributes:
      examples: the split's.
      facts: about it (`bytes` of text, say), which a score divides by or says beside its numbers.
      fitted_to: examples of all splits that share the lengths of padded batches, and so compiled programs; those that
        most is to be gained from first. Without any, the lengths fit this split.
      notices: what its reader may want to know if a model learns from it.
    """

    examples: Examples
    facts: dict[str, int]
    fitted_to: tuple[Examples, ...] = ()
    notices: tuple[str, ...] = ()

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


class BatchPredictions(NamedTuple):
    """One batch of held-out data after a model has read it, on the host.

    Attributes:
      seen: what `EvalSpec.read` gave; teacher: what it gave for the teacher, `None` where there is none.
      batch: what was read, labels included.
      tokenizer, labels: of the model.
    """

    seen: Mapping[str, np.ndarray]
    teacher: Mapping[str, np.ndarray] | None
    batch: Mapping[str, np.ndarray]
    tokenizer: Any
    labels: tuple[str, ...]


class EvalSpec(NamedTuple):
    """What a report says of a task's models.

    Attributes:
      measures: the first is the quality that models are compared by, the others stand beside it.
      pieces: `BatchPredictions -> {column: one number a piece}`; with a teacher also what the agreement adds up.
      same: the column that is equal for all models that read the same data.
      read: `(outputs, batch) -> {name: array [rows, ...]}`, `predicted` among them, inside the compiled forward pass.
      agreement: measure of equal predictions.
    """

    measures: tuple[Metric, ...]
    pieces: Callable[[BatchPredictions], dict[str, np.ndarray]]
    same: str
    read: Callable[[Outputs, Batch], dict[str, jax.Array]] = tokens_read
    agreement: Metric = agreement


def token_pieces(read: BatchPredictions) -> dict[str, np.ndarray]:
    """Every row that has something to predict: its nats and tokens, and on how many the teacher predicts the same."""
    known = counted(read.batch["labels"])
    rows = known.any(axis=1)
    found = {"nats": read.seen["nats"][rows], "tokens": known.sum(axis=1)[rows]}
    if read.teacher is None:
        return found
    agreed = ((read.seen["predicted"] == read.teacher["predicted"]) & known).sum(axis=1)
    return found | {"agreed": agreed[rows], "compared": found["tokens"]}


def batch_pieces(read: BatchPredictions) -> dict[str, np.ndarray]:
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
    quality: EvalSpec
    columns: Mapping[str, Column]
    labels: Callable[[Source], tuple[str, ...]] = no_labels
    predict: Callable[[Outputs, Batch], dict[str, jax.Array]] = no_predictions
    unlabelled: Callable[[Source, Any, DataSettings], Examples] | None = None
    sentinels: int = 0


def column(record: Record, name: str, source: Source) -> Any:
    """A field of a record.

    Raises:
      Unusable: as all readers of fields do where a record has no such field, or in it what they do not read.
    """
    if name not in record:
        raise Unusable(
            f"no column {name!r}, only {', '.join(map(repr, record))}; "
            f"rename with {source.columns_field} = {{{name!r}: ...}}"
        )
    return record[name]


def text_of(record: Record, name: str, source: Source) -> str:
    """A field that holds text."""
    text = column(record, name, source)
    if not isinstance(text, str):
        raise Unusable(f"the {name} {reprlib.repr(text)} is {type(text).__name__}, not a string")
    if not text.strip():
        raise Unusable(f"the {name} is blank")
    return text


def texts_of(record: Record, source: Source) -> tuple[str, ...]:
    """`(text,)`, or `(text, text_pair)` where records have both."""
    return tuple(text_of(record, name, source) for name in ("text", "text_pair") if name == "text" or name in record)


def number_of(record: Record, name: str, source: Source) -> float:
    """A field that holds a number which float32 has, or a text that says one."""
    value = column(record, name, source)
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise Unusable(f"{name} {reprlib.repr(value)} is not a number")
    return number


def weight_of(record: Record, source: Source) -> float | None:
    """The field `weight`, where records have one: what a distillation may weigh its samples by."""
    if "weight" not in record:
        return None
    weight = number_of(record, "weight", source)
    if weight < 0:
        raise Unusable(f"weight {record['weight']!r} is less than 0")
    return weight


OPTIONAL = ("text_pair", "weight")
"""Columns that rows need not have, but all alike."""


def documents_of(source: Source) -> Iterator[str]:
    """Every record's `text`, read as it is asked for."""
    return source.usable(lambda record: text_of(record, "text", source))


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


def sample_weights(weights: Sequence[float | None]) -> dict[str, np.ndarray]:
    """The column `weight` float32 `[samples]`, where the data have one."""
    return {} if None in weights else {"weight": np.array(weights, np.float32)}


def scalar(terms: Mapping[str, Any], name: str) -> float:
    """`sum / weight` on the host; NaN where nothing was added up."""
    weight = float(terms[name].weight)
    return float(terms[name].sum) / weight if weight else math.nan


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several batches, padded to the longest with the ignored label."""
    width = max((p.shape[1] for p in parts if p.ndim > 1), default=0)
    return np.concatenate(
        [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-100) if p.ndim > 1 else p for p in parts]
    )
