"""Task: how records become batches, outputs a loss, and predictions a score."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import Term, Terms
from jaxlm.data.loader import Batches
from jaxlm.data.ragged import Examples
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source

Outputs = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


class Prepared(NamedTuple):
    """Encoded data of one split, and facts about it (`bytes` of text, say) that a score divides by."""

    examples: Examples
    facts: dict[str, int]


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


class Task(NamedTuple):
    """One kind of training.

    Attributes:
      structure: fields of the model's config that the task decides: its `head`, and what that needs.
      prepare: `(source, tokenizer, labels, settings) -> Prepared`.
      batches: `(prepared, tokenizer, settings, batch_size, seed) -> Batches`; `seed` None: in order, each row once.
      loss: `(outputs, batch) -> terms`, what training minimises.
      measure: `(outputs, batch) -> terms`, what evaluation adds up.
      score: `(sums and weights of terms, predictions by row, labels, facts) -> Score`.
      labels: `source -> names of the classes`, learned from training data.
      predict: `(outputs, batch) -> {name: array [batch, ...]}` that `score` reads on the host.
    """

    structure: Mapping[str, Any]
    prepare: Callable[[Source, Any, tuple[str, ...], DataSettings], Prepared]
    batches: Callable[[Prepared, Any, DataSettings, int, int | None], Batches]
    loss: Callable[[Outputs, Batch], Terms]
    measure: Callable[[Outputs, Batch], Terms]
    score: Callable[[dict[str, Term], dict[str, np.ndarray], tuple[str, ...], Mapping[str, int]], Score]
    labels: Callable[[Source], tuple[str, ...]] = no_labels
    predict: Callable[[Outputs, Batch], dict[str, jax.Array]] = no_predictions


def column(record: Mapping[str, Any], name: str, source: Source) -> Any:
    """A field of a record, or a ValueError that names the fields there are."""
    if name not in record:
        raise ValueError(
            f"{source.place} has no column {name!r}, only {', '.join(map(repr, record))}; "
            f"rename with config.data.columns = {{{name!r}: ...}}"
        )
    return record[name]


def texts_of(record: Mapping[str, Any], source: Source) -> tuple[str, ...]:
    """`(text,)`, or `(text, text_pair)` where records have both."""
    first = column(record, "text", source)
    return (first, record["text_pair"]) if "text_pair" in record else (first,)


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
            "select the columns to read with config.data.columns"
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
