"""What a model did on held-out data, example by example, and how sure one can be of what follows from it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core import lookup
from jaxlm.tasks import TASKS, EvalSpec, Metric


class Estimate(NamedTuple):
    """A value and twice its standard error (about a 95% interval); `None` where it cannot be known."""

    value: float
    error: float | None


@dataclass(frozen=True)
class PerExampleResults:
    """What a model did on held-out data, one number an example (a text, a sentence, a batch of running text).

    Attributes:
      task: name of the task, whose metrics apply.
      columns: of all examples by name (`nats` and `bytes`, `true` and `predicted`, …), see the task's `evaluation`.
      classes: number of classes of a classification.

    >>> text = PerExampleResults("causal", {"nats": (693.147, 1386.294), "tokens": (250, 500), "bytes": (1000, 2000)})
    >>> [round(text.estimate(metric).value, 3) for metric in text.metrics]
    [1.0, 16.0]
    """

    task: str
    columns: Mapping[str, tuple[float, ...]]
    classes: int = 0

    def __post_init__(self):
        lookup(TASKS, self.task, "task")
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) != 1 or not max(sizes.values(), default=0):
            raise ValueError(f"held-out data: all columns must list the same examples, at least one; there are {sizes}")
        for name in ("tokens", "bytes", "words"):
            if name in self.columns and sum(self.columns[name]) <= 0:
                raise ValueError(f"held-out data without {name} measures nothing")

    @property
    def spec(self) -> EvalSpec:
        """How the task's models are evaluated."""
        return TASKS[self.task].evaluation

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of a report: the quality, and what stands beside it."""
        return self.spec.compared

    @property
    def num_examples(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def quality(self) -> Estimate:
        """The first metric of the task."""
        return self.estimate(self.metrics[0])

    @property
    def agreement(self) -> Estimate | None:
        """How far predictions are the teacher's, `None` where there is no teacher."""
        compared = {"compared", "teacher"} & self.columns.keys()
        return self.estimate(self.spec.agreement) if compared else None

    def sums(self, metric: Metric) -> np.ndarray:
        """float64 `[examples, k]`: what each example adds to a metric."""
        return metric.sums({name: np.asarray(column) for name, column in self.columns.items()}, self.classes)

    def estimate(self, metric: Metric) -> Estimate:
        """A metric over all examples."""
        sums = self.sums(metric)
        return _estimate(float(metric.value(sums.sum(axis=0))), left_out(metric, sums))


def left_out(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """The metric without each of the examples in turn: `[examples]`."""
    with np.errstate(invalid="ignore", divide="ignore"):  # of a single example nothing is left
        return metric.value(sums.sum(axis=0) - sums)


def _estimate(value: float, without: np.ndarray) -> Estimate:
    """A value with the jackknife's error: `2 sqrt((n-1)/n Σ(θ_i - mean θ)²)`, θ_i being the value without example i.

    Equal to the usual error for a mean, and close to the bootstrap's for smooth functions of means (Efron and Stein
    1981). Of a difference between two models that read the same examples, θ_i is the difference without the example:
    what is hard for both then cancels.
    """
    n = len(without)
    if n < 2 or not (math.isfinite(value) and np.isfinite(without).all()):
        return Estimate(value, None)
    return Estimate(value, 2 * float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())))


def difference(a: PerExampleResults, b: PerExampleResults, metric: Metric | None = None) -> Estimate:
    """A metric (by default the quality) of `a` minus that of `b`, paired by example.

    Running text that two tokenizers cut differently has no common examples: both errors are then added as if the models
    had read different texts of one kind. Where only one of the two is not a number, the difference is infinite in
    favour of the other.

    Raises:
      ValueError: for models that did not read the same data.
    """
    metric, same = metric or a.metrics[0], a.spec.same
    if a.task != b.task or not _same(a, b, same):
        raise ValueError(f"measured on different held-out data: the examples of {a.task} and {b.task} differ in {same}")
    of_a, of_b = a.estimate(metric), b.estimate(metric)
    if math.isnan(of_b.value) and not math.isnan(of_a.value):
        return Estimate(math.inf if metric.higher else -math.inf, None)
    change = of_a.value - of_b.value
    if a.columns[same] == b.columns[same]:
        return _estimate(change, left_out(metric, a.sums(metric)) - left_out(metric, b.sums(metric)))
    known = of_a.error is not None and of_b.error is not None
    return Estimate(change, math.hypot(of_a.error or 0, of_b.error or 0) if known else None)


def _same(a: PerExampleResults, b: PerExampleResults, name: str) -> bool:
    """Whether two models read the same: equal example by example, or as many bytes of text."""
    if a.columns[name] == b.columns[name]:
        return True
    return name == "bytes" and math.isclose(sum(a.columns[name]), sum(b.columns[name]), rel_tol=0.01)


def combine(function: Callable[..., Any], *results: PerExampleResults, metric: Metric | None = None) -> Estimate:
    """A function of several models' metrics, with the error of leaving the same example out of all of them.

    What is asked of compression is often a ratio: the share of a teacher's score, the part of a drop that is recovered.

    Args:
      function: of numpy arrays, one a model.
      metric: the quality by default.
    """
    first, *others = results
    metric, same = metric or first.metrics[0], first.spec.same
    for other in others:
        difference(first, other, metric)  # raises for models that did not read the same
    sums = [result.sums(metric) for result in results]
    value = float(function(*(metric.value(of_model.sum(axis=0)) for of_model in sums)))
    if any(other.columns[same] != first.columns[same] for other in others):
        return Estimate(value, None)
    return _estimate(value, np.asarray(function(*(left_out(metric, of_model) for of_model in sums))))
