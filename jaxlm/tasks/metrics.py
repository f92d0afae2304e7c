"""Metrics: how good a model is on held-out data, each a function of sums over examples.

An *example* is the unit that is resampled: a text, a sentence, a batch of running text. Every metric is a function of
sums over examples, so it has a value for any subset of them, and from leaving out one at a time its standard error.
Here is the only implementation of each: `result.json`, the log of a training and reports all use it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

Columns = Mapping[str, np.ndarray]
"""One number an example, by name: `nats`, `tokens`, `true`, `predicted`, … Every array is `[examples]`."""


class ExampleSums(Protocol):
    """What every example adds to a metric."""

    def __call__(self, columns: Columns, classes: int, /) -> np.ndarray:
        """float64 `[examples, k]`; `classes` is the number of classes of a classification."""
        ...


class MetricValue(Protocol):
    """The metric of sums that were added over examples."""

    def __call__(self, sums: np.ndarray, /) -> np.ndarray:
        """float64 `[..., k] -> [...]`, NaN where there is no such metric."""
        ...


class Metric(NamedTuple):
    """A figure of merit.

    Attributes:
      name: key in `report.json`; label: heading of its column; unit: what a difference counts, in a sentence.
      sums: what each example adds.
      value: of added sums.
      higher: more is better.
      percent: shown in percent, differences in points.
      comparatives: what a better, an equal and a worse model is called; best: heading of the best one.
      requires: a column without which a result leaves the metric out: it is missing, or adds up to nothing.
    """

    name: str
    label: str
    unit: str
    sums: ExampleSums
    value: MetricValue
    higher: bool = True
    percent: bool = False
    comparatives: tuple[str, str, str] = ("better", "as good", "worse")
    best: str = "Best"
    requires: str = ""

    def over(self, columns: Columns, classes: int) -> float:
        """The metric over all examples.

        >>> accuracy.over({"true": np.array([0, 1, 1, 0]), "predicted": np.array([0, 1, 1, 1])}, classes=2)
        0.75
        """
        return float(self.value(self.sums(columns, classes).sum(axis=0)))

    def applies(self, columns: Columns) -> bool:
        """Whether a result has it: what it requires is there."""
        return not self.requires or (self.requires in columns and columns[self.requires].sum() > 0)


def columns_of(*names: str) -> ExampleSums:
    """Sums of columns as they are."""
    return lambda columns, classes: np.stack([np.asarray(columns[name], np.float64) for name in names], axis=-1)


def mean_of(name: str) -> ExampleSums:
    """Sums of which the fraction is the mean of a column."""

    def sums(columns: Columns, classes: int) -> np.ndarray:
        values = np.asarray(columns[name], np.float64)
        return np.stack([values, np.ones_like(values)], axis=-1)

    return sums


def _divide(a: np.ndarray, b: np.ndarray, nothing: float = math.nan) -> np.ndarray:
    """`a / b`, and `nothing` where there is nothing to divide by."""
    return np.where(b == 0, nothing, a / np.where(b == 0, 1.0, b))


def _fraction(sums: np.ndarray) -> np.ndarray:
    """The first sum divided by the second."""
    return _divide(sums[..., 0], sums[..., 1])


# -- language modelling -----------------------------------------------------------------------------------------------


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    """`Σ nats / (ln 2 · Σ bytes)`."""
    return _fraction(sums) / math.log(2)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """`exp(Σ nats / Σ tokens)`, infinite rather than an overflow."""
    nats = _fraction(sums)
    return np.where(nats < 700, np.exp(np.minimum(nats, 700)), np.where(np.isnan(nats), np.nan, np.inf))


# -- classification ---------------------------------------------------------------------------------------------------


def _hits(columns: Columns, classes: int) -> np.ndarray:
    """Whether the prediction is right, of one each."""
    hits = np.asarray(columns["true"]) == np.asarray(columns["predicted"])
    return np.stack([hits, np.ones(len(hits))], axis=-1).astype(np.float64)


def _class_counts(columns: Columns, classes: int) -> np.ndarray:
    """Per class: right, predicted, true. `[examples, 3 · classes]`."""
    numbers = np.arange(classes)
    true = np.asarray(columns["true"])[:, None] == numbers
    predicted = np.asarray(columns["predicted"])[:, None] == numbers
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

    0 where all is of one class, as scikit-learn's; NaN without an example.

    >>> float(_matthews(np.array([5.0, 5.0, 5.0, 5.0, 5.0, 5.0])))
    1.0
    """
    right, predicted, true = np.split(sums, 3, axis=-1)
    c, s = right.sum(axis=-1), true.sum(axis=-1)
    together = c * s - (predicted * true).sum(axis=-1)
    spread = (s**2 - np.square(predicted).sum(axis=-1)) * (s**2 - np.square(true).sum(axis=-1))
    return np.where(s == 0, math.nan, _divide(together, np.sqrt(np.maximum(spread, 0)), 0.0))


# -- entities: sums are those right, predicted and true ---------------------------------------------------------------


def _entity_f1(sums: np.ndarray) -> np.ndarray:
    """`2 right / (predicted + true)`, NaN where there is none."""
    return _divide(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _entity_precision(sums: np.ndarray) -> np.ndarray:
    """`right / predicted`: 0 where none is predicted, NaN where there is none at all."""
    return _share_of_entities(sums, 1)


def _entity_recall(sums: np.ndarray) -> np.ndarray:
    """`right / true`: 0 where there is none to find, NaN where none is predicted either."""
    return _share_of_entities(sums, 2)


def _share_of_entities(sums: np.ndarray, of: int) -> np.ndarray:
    return np.where(sums[..., 1] + sums[..., 2] == 0, math.nan, _divide(sums[..., 0], sums[..., of], 0.0))


# -- regression -------------------------------------------------------------------------------------------------------


def _squared_errors(columns: Columns, classes: int) -> np.ndarray:
    """`(predicted - true)²`, of one each."""
    true, predicted = (np.asarray(columns[name], np.float64) for name in ("true", "predicted"))
    return np.stack([np.square(predicted - true), np.ones_like(true)], axis=-1)


def moments(first: str, second: str) -> ExampleSums:
    """What a correlation adds up: `1, x, y, x², y², xy` about the means, where nothing cancels."""

    def sums(columns: Columns, classes: int) -> np.ndarray:
        return _moments(np.asarray(columns[first], np.float64), np.asarray(columns[second], np.float64))

    return sums


def rank_moments(first: str, second: str) -> ExampleSums:
    """The moments of ranks, ties at their mean rank; NaN where a value is no finite number, and so has no rank."""

    def sums(columns: Columns, classes: int) -> np.ndarray:
        return _moments(_ranks(columns[first]), _ranks(columns[second]))

    return sums


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values) if np.isfinite(values).all() else np.full(len(values), math.nan)


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if not len(x):
        return np.zeros((0, 6))
    with np.errstate(invalid="ignore"):  # between infinities there is no difference
        x, y = x - x[0], y - y[0]  # of equal numbers nothing is left, rounding included
        x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlation from its moments; NaN where one side does not vary, as there is none.

    >>> float(_pearson(moments("a", "b")({"a": np.array([1.0, 2.0, 4.0]), "b": np.array([2.0, 4.0, 8.0])}, 0).sum(0)))
    1.0
    """
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    return _divide(n * xy - x * y, np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 0)))


# -- by name ----------------------------------------------------------------------------------------------------------

TEXT = ("better at text", "as good at text", "worse at text")

bits_per_byte = Metric(
    name="bits_per_byte",
    label="Bits per byte",
    unit="bits per byte",
    sums=columns_of("nats", "bytes"),
    value=_bits_per_byte,
    higher=False,
    comparatives=TEXT,
    best="Best text",
    requires="bytes",
)
loss = Metric(
    name="loss",
    label="Nats per token",
    unit="nats per token",
    sums=columns_of("nats", "tokens"),
    value=_fraction,
    higher=False,
    comparatives=TEXT,
    best="Best text",
)
perplexity = Metric(
    name="perplexity",
    label="Perplexity",
    unit="perplexity",
    sums=columns_of("nats", "tokens"),
    value=_perplexity,
    higher=False,
    comparatives=TEXT,
)
token_accuracy = Metric(
    name="accuracy",
    label="Accuracy of tokens",
    unit="accuracy of tokens",
    sums=columns_of("right", "tokens"),
    value=_fraction,
    percent=True,
)
pair_accuracy = Metric(
    name="next_sentence_accuracy",
    label="Accuracy of pairs",
    unit="accuracy of pairs",
    sums=columns_of("pairs_right", "pairs"),
    value=_fraction,
    percent=True,
)
example_loss = Metric(
    name="loss",
    label="Nats per example",
    unit="nats per example",
    sums=mean_of("nats"),
    value=_fraction,
    higher=False,
)
accuracy = Metric(
    name="accuracy",
    label="Accuracy",
    unit="accuracy",
    sums=_hits,
    value=_fraction,
    percent=True,
    comparatives=("more accurate", "as accurate", "less accurate"),
    best="Most accurate",
)
macro_f1 = Metric(name="f1", label="Macro F1", unit="macro F1", sums=_class_counts, value=_macro_f1, percent=True)
matthews = Metric(
    name="mcc", label="Matthews correlation", unit="Matthews correlation", sums=_class_counts, value=_matthews
)
word_loss = Metric(
    name="loss",
    label="Nats per word",
    unit="nats per word",
    sums=columns_of("nats", "words"),
    value=_fraction,
    higher=False,
)
entity_f1 = Metric(
    name="entity_f1",
    label="Entity F1",
    unit="entity F1",
    sums=columns_of("entities_right", "entities_predicted", "entities_true"),
    value=_entity_f1,
    percent=True,
    comparatives=("better at entities", "as good at entities", "worse at entities"),
    best="Best at entities",
)
entity_precision = entity_f1._replace(
    name="entity_precision", label="Entity precision", unit="entity precision", value=_entity_precision
)
entity_recall = entity_f1._replace(
    name="entity_recall", label="Entity recall", unit="entity recall", value=_entity_recall
)
word_accuracy = Metric(
    name="word_accuracy",
    label="Accuracy of words",
    unit="accuracy of words",
    sums=columns_of("right", "words"),
    value=_fraction,
    percent=True,
)
mean_squared_error = Metric(
    name="loss",
    label="Mean squared error",
    unit="mean squared error",
    sums=_squared_errors,
    value=_fraction,
    higher=False,
)
pearson = Metric(
    name="pearson",
    label="Pearson correlation",
    unit="correlation",
    sums=moments("true", "predicted"),
    value=_pearson,
    comparatives=("better at rating", "as good at rating", "worse at rating"),
    best="Best ratings",
)
spearman = pearson._replace(
    name="spearman",
    label="Spearman correlation",
    unit="rank correlation",
    sums=rank_moments("true", "predicted"),
)
agreement = Metric(
    name="agreement",
    label="Agrees with teacher",
    unit="agreement",
    sums=columns_of("agreed", "compared"),
    value=_fraction,
    percent=True,
)
correlation = Metric(
    name="agreement",
    label="Correlates with teacher",
    unit="correlation",
    sums=moments("teacher", "predicted"),
    value=_pearson,
)
