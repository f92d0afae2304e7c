"""Task: how records become batches, outputs a loss, and predictions metrics."""

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxlm.core import Batch, TaskLoss
from jaxlm.data.loader import Batches, fitted
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Record, Source, Unusable
from jaxlm.losses.cross_entropy import IGNORED
from jaxlm.tasks.metrics import Columns, Metric, agreement

Outputs = Mapping[str, Any]
"""What the forward pass gives: `logits` float32 `[rows, classes]`, of tokens `[rows, length, classes]`, and more."""


class Prepared(NamedTuple):
    """Encoded data of one split.

    Attributes:
      examples: the split's.
      facts: numbers about it (`bytes` of text, say), which `result.json` has beside the metrics.
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
        first, *others = [examples.lengths for examples in self.fitted_to or (self.examples,)]
        lengths = fitted(first, settings.buckets, settings.max_length)
        longest = max([int(sizes.max(initial=0)) for sizes in others], default=0)
        return lengths if longest <= lengths[-1] else (*lengths, *fitted(np.array([longest]), 1, settings.max_length))


class Column(NamedTuple):
    """One array of a batch: a number a token (`[rows, length]`, of groups `[rows, group, length]`), or one a row; and
    its dtype."""

    per_token: bool = True
    dtype: Any = np.int32


PACKED = {name: Column() for name in ("input_ids", "segment_ids", "positions")}
PADDED = {name: Column() for name in ("input_ids", "attention_mask")}
DECODER = {name: Column() for name in ("decoder_input_ids", "decoder_attention_mask")}


# -- evaluation -------------------------------------------------------------------------------------------------------


class BatchPredictions(NamedTuple):
    """One batch of held-out data after a model has read it, on the host.

    Attributes:
      read: what `EvalSpec.read` gave, `[rows, ...]`; teacher: what it gave for the teacher, `None` where there is none.
      batch: the columns of the batch but the model's inputs: `labels`, and what else examples are counted by.
      labels: names of the model's classes.
    """

    read: Mapping[str, np.ndarray]
    teacher: Mapping[str, np.ndarray] | None
    batch: Mapping[str, np.ndarray]
    labels: tuple[str, ...]


class Read(Protocol):
    """What evaluation needs of a forward pass, inside the compiled program."""

    def __call__(self, outputs: Outputs, batch: Batch, /) -> dict[str, jax.Array]:
        """`{name: [rows, ...]}`; `predicted` is among them: int32 classes or tokens, or float32 numbers."""
        ...


class ExampleColumns(Protocol):
    """The examples of a batch, on the host."""

    def __call__(self, predictions: BatchPredictions, /) -> dict[str, np.ndarray]:
        """`{column: [examples]}` without filler and ignored labels; with a teacher also what agreement adds up."""
        ...


class ColumnFilter(Protocol):
    """Some of the columns, or of their examples."""

    def __call__(self, columns: Columns, /) -> Columns: ...


class Table(Protocol):
    """Metrics in detail, as text for people."""

    def __call__(self, predictions: Sequence[BatchPredictions], facts: Mapping[str, int], /) -> str:
        """Of all batches of a split, and `Prepared.facts`; "" where there is nothing to say."""
        ...


class EvalSpec(NamedTuple):
    """How a task's models are evaluated: from outputs to columns of numbers by example, and from those to metrics.

    Attributes:
      metrics: of `result.json` and of the log of a training, by key.
      compared: of a report; the first is the quality that models are compared by, the others stand beside it.
      read: what is kept of a forward pass.
      examples: what of that is counted, one number an example.
      same: the column that is equal for all models that read the same data.
      reported: what a report stores of the columns: those that `compared`, `agreement` and `same` are about.
      agreement: metric of equal predictions.
      agreement_only: names of `read` that nothing but agreement needs; they are not computed without.
      facts: further numbers of `result.json`, by key the name in `Prepared.facts`.
      table: `report.txt`, where a task has one.
    """

    metrics: Mapping[str, Metric]
    compared: tuple[Metric, ...]
    read: Read
    examples: ExampleColumns
    same: str
    reported: ColumnFilter
    agreement: Metric = agreement
    agreement_only: tuple[str, ...] = ()
    facts: Mapping[str, str] = {}
    table: Table | None = None


def only(*names: str) -> ColumnFilter:
    """The columns of these names, as far as they are there.

    >>> only("nats", "agreed")({"nats": 1, "right": 2})
    {'nats': 1}
    """
    return lambda columns: {name: columns[name] for name in names if name in columns}


# -- tasks ------------------------------------------------------------------------------------------------------------


class Prepare(Protocol):
    """Encodes the records of a split."""

    def __call__(self, source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings, /) -> Prepared:
        """`labels` are the classes in the order of the model's outputs, () for tasks without."""
        ...


class MakeBatches(Protocol):
    """Lays examples out in rows."""

    def __call__(
        self, prepared: Prepared, tokenizer: Any, settings: DataSettings, batch_size: int, seed: int | None, /
    ) -> Batches:
        """With a `seed` drawn anew every epoch; `None`: in order, each row once."""
        ...


class ClassNames(Protocol):
    """Learns the classes from training data."""

    def __call__(self, source: Source, /) -> tuple[str, ...]: ...


class EncodeUnlabelled(Protocol):
    """Encodes data without labels, on which only a teacher's predictions are learned."""

    def __call__(self, source: Source, tokenizer: Any, settings: DataSettings, /) -> Examples:
        """With a column `distill_mask` of 0 and 1 instead of `labels`: where the teacher's predictions are learned."""
        ...


def no_labels(source: Source) -> tuple[str, ...]:
    """For tasks without classes."""
    return ()


class Task(NamedTuple):
    """One kind of training.

    A row of a batch is what must stay together: a text, or a group of texts (a pair, a triple, a question with its
    1 + k answers). Groups are an axis of their own, `input_ids [rows, group, length]`, so that batches, accumulation
    and sharding cut between groups only. The network reads texts: the arrays of `outputs` are `[rows · group, …]`, the
    texts of a group one after the other, and a loss takes `outputs["pooled"].reshape(-1, group, width)`. `labels` are
    the row's (which of its texts is the right one, say); those of filler are ignored, and tell that it is filler. A
    group with fewer texts than others is filled up with empty ones.

    Attributes:
      structure: fields of the model's config that the task decides: its `head`, and what that needs.
      prepare: encodes a split.
      batches: rows of a split.
      loss: what training minimises.
      evaluation: how its models are evaluated.
      columns: the arrays of a batch.
      labels: names of the classes, learned from training data.
      unlabelled: encodes data without labels; `None` for tasks that give no text or word a label.
      sentinels: `<extra_id_…>` tokens that a tokenizer trained for the task has.
      group: texts of a row; `prepare` gives Examples of such groups.
      couples_rows: what a row adds to the loss depends on the other rows of its batch (negatives that are other rows'
        positives), so that a batch cannot be computed in parts: `config.train.grad_accum` is refused.
    """

    structure: Mapping[str, Any]
    prepare: Prepare
    batches: MakeBatches
    loss: TaskLoss
    evaluation: EvalSpec
    columns: Mapping[str, Column]
    labels: ClassNames = no_labels
    unlabelled: EncodeUnlabelled | None = None
    sentinels: int = 0
    group: int = 1
    couples_rows: bool = False


# -- fields of records ------------------------------------------------------------------------------------------------


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
    """Examples with labels, and behind them those without; `distill_mask` says where a teacher is learned from.

    Args:
      labelled: with a column `labels`: a class or a number a row, or a class a token.
      unlabelled: what a model reads, and instead of `labels` a `distill_mask` of 0 and 1. Where only one side has a
        `weight`, it is 1 on the other.

    Raises:
      ValueError: where only one side is of pairs of texts.
    """
    paired = ["token_type_ids" in examples.columns for examples in (labelled, unlabelled)]
    if paired[0] != paired[1]:
        having, lacking = ("the training data", "these texts") if paired[0] else ("these texts", "the training data")
        raise ValueError(f"config.data.unlabelled: {having} have a column text_pair, {lacking} have none")
    labels, distill_mask = labelled.columns["labels"], unlabelled.columns["distill_mask"]
    values = labels.values if isinstance(labels, Ragged) else labels
    ignored = np.nan if values.dtype.kind == "f" else IGNORED
    size = len(distill_mask.values if isinstance(distill_mask, Ragged) else distill_mask)

    def like(column: Ragged | np.ndarray, values: np.ndarray) -> Ragged | np.ndarray:
        return Ragged(values, column.offsets) if isinstance(column, Ragged) else values

    first = {**labelled.columns, "distill_mask": like(labels, counted(values).astype(np.int32))}
    second = {**unlabelled.columns, "labels": like(distill_mask, np.full(size, ignored, values.dtype))}
    if "weight" in first or "weight" in second:
        first.setdefault("weight", np.ones(len(labelled), np.float32))
        second.setdefault("weight", np.ones(len(unlabelled), np.float32))
    return Examples(first).then(Examples(second))


def sample_weights(weights: Sequence[float | None]) -> dict[str, np.ndarray]:
    """The column `weight` float32 `[samples]`, where the data have one."""
    return {} if None in weights else {"weight": np.array(weights, np.float32)}
