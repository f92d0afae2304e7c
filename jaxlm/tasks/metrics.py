"""Measures: how good a model is on held-out data, each a function of sums over pieces.

A *piece* is what may stand or fall together: an example, a sentence, a batch of running text. Every measure here is a
function of sums over pieces, so it has a value for any subset of them, and from leaving out one at a time its error.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Columns = Mapping[str, np.ndarray]
"""What was seen of every piece, one number each: `nats`, `tokens`, `true`, `predicted`, …"""


class Metric(NamedTuple):
    """A figure of merit.

    Attributes:
      name: key in `report.json`; label: heading of its column; unit: what a difference counts, in a sentence.
      sums: `(columns, classes) -> float64 [pieces, k]`: what each piece adds.
      value: of added sums, `[..., k] -> [...]`.
      higher: more is better.
      percent: shown in percent, differences in points.
      words: a better, an equal and a worse model; best: heading of the one that has the most of it.
    """

    name: str
    label: str
    unit: str
    sums: Callable[[Columns, int], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    higher: bool = True
    percent: bool = False
    words: tuple[str, str, str] = ("better", "as good", "worse")
    best: str = "Best"


def columns_of(*names: str) -> Callable[[Columns, int], np.ndarray]:
    """Sums of columns as they are."""
    return lambda columns, classes: np.stack([np.asarray(columns[name], np.float64) for name in names], axis=-1)


def _fraction(sums: np.ndarray) -> np.ndarray:
    """The first sum divided by the second."""
    return _divide(sums[..., 0], sums[..., 1])


def _divide(a: np.ndarray, b: np.ndarray, nothing: float = math.nan) -> np.ndarray:
    """`a / b`, and `nothing` where there is nothing to divide by."""
    return np.where(b == 0, nothing, a / np.where(b == 0, 1.0, b))


def _right(columns: Columns, classes: int) -> np.ndarray:
    right = np.asarray(columns["true"]) == np.asarray(columns["predicted"])
    return np.stack([right, np.ones(len(right))], axis=-1).astype(np.float64)


def _by_class(columns: Columns, classes: int) -> np.ndarray:
    """Per class: right, predicted, true. `[pieces, 3 · classes]`."""
    every = np.arange(classes)
    true = np.asarray(columns["true"])[:, None] == every
    predicted = np.asarray(columns["predicted"])[:, None] == every
    return np.concatenate([true & predicted, predicted, true], axis=-1).astype(np.float64)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean of `2 right / (predicted + true)` over the classes that occur, as scikit-learn's.

    >>> float(_macro_f1(np.array([1.0, 0.0, 1.0, 2.0, 0.0, 1.0, 1.0, 0.0, 2.0])))
    0.6666666666666666
    """
    right, predicted, true = np.split(sums, 3, axis=-1)
    occur = predicted + true > 0
    return _divide(_divide(2 * right, predicted + true, 0.0).sum(axis=-1), occur.sum(axis=-1))


def _matthews(sums: np.ndarray) -> np.ndarray:
    """`(c s - Σ p t) / sqrt((s² - Σ p²)(s² - Σ t²))`: c right of s, p predicted and t true per class (Gorodkin 2004).

    0 where all is of one class, as scikit-learn's.

    >>> float(_matthews(np.array([5.0, 5.0, 5.0, 5.0, 5.0, 5.0])))
    1.0
    """
    right, predicted, true = np.split(sums, 3, axis=-1)
    c, s = right.sum(axis=-1), true.sum(axis=-1)
    together = c * s - (predicted * true).sum(axis=-1)
    spread = (s**2 - np.square(predicted).sum(axis=-1)) * (s**2 - np.square(true).sum(axis=-1))
    return _divide(together, np.sqrt(np.maximum(spread, 0)), 0.0)


def _entity_f1(sums: np.ndarray) -> np.ndarray:
    """`2 right / (predicted + true)`, NaN where there is none."""
    return _divide(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def moments(first: str, second: str) -> Callable[[Columns, int], np.ndarray]:
    """What a correlation adds up: `1, x, y, x², y², xy` about the means, where nothing cancels."""

    def sums(columns: Columns, classes: int) -> np.ndarray:
        x, y = (np.asarray(columns[name], np.float64) for name in (first, second))
        x, y = x - x[:1], y - y[:1]  # of equal numbers nothing is left, rounding included
        x, y = x - x.mean(), y - y.mean()
        return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)

    return sums


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlation from its moments; NaN where one side does not vary, as there is none.

    >>> float(_pearson(moments("a", "b")({"a": np.array([1.0, 2.0, 4.0]), "b": np.array([2.0, 4.0, 8.0])}, 0).sum(0)))
    1.0
    """
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    return _divide(n * xy - x * y, np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 0)))


def _per_token(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """`exp(Σ nats / Σ tokens)`, infinite rather than an overflow."""
    nats = _per_token(sums)
    return np.where(nats < 700, np.exp(np.minimum(nats, 700)), np.where(np.isnan(nats), np.nan, np.inf))


TEXT = ("better at text", "as good at text", "worse at text")

bits_per_byte = Metric(
    "bits_per_byte",
    "Bits per byte",
    "bits per byte",
    columns_of("nats", "bytes"),
    lambda sums: _per_token(sums) / math.log(2),
    higher=False,
    words=TEXT,
    best="Best text",
)
loss = Metric(
    "loss",
    "Nats per token",
    "nats per token",
    columns_of("nats", "tokens"),
    _per_token,
    higher=False,
    words=TEXT,
    best="Best text",
)
perplexity = Metric(
    "perplexity", "Perplexity", "perplexity", columns_of("nats", "tokens"), _perplexity, higher=False, words=TEXT
)
accuracy = Metric(
    "accuracy",
    "Accuracy",
    "accuracy",
    _right,
    _fraction,
    percent=True,
    words=("more accurate", "as accurate", "less accurate"),
    best="Most accurate",
)
macro_f1 = Metric("f1", "Macro F1", "macro F1", _by_class, _macro_f1, percent=True)
matthews = Metric("mcc", "Matthews correlation", "Matthews correlation", _by_class, _matthews)
entity_f1 = Metric(
    "entity_f1",
    "Entity F1",
    "entity F1",
    columns_of("entities_right", "entities_predicted", "entities_true"),
    _entity_f1,
    percent=True,
    words=("better at entities", "as good at entities", "worse at entities"),
    best="Best at entities",
)
word_accuracy = Metric(
    "word_accuracy", "Accuracy of words", "accuracy of words", columns_of("right", "words"), _fraction, percent=True
)
pearson = Metric(
    "pearson",
    "Pearson correlation",
    "correlation",
    moments("true", "predicted"),
    _pearson,
    words=("better at rating", "as good at rating", "worse at rating"),
    best="Best ratings",
)
agreement = Metric(
    "agreement", "Agrees with teacher", "agreement", columns_of("agreed", "compared"), _fraction, percent=True
)
correlation = Metric("agreement", "Correlates with teacher", "correlation", moments("teacher", "predicted"), _pearson)
