"""What a model did on held-out data, piece by piece, and how sure one can be of what follows from it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core import lookup
from jaxlm.tasks import TASKS, Metric


class Estimate(NamedTuple):
    """A value and twice its standard error (about a 95% interval); `None` where it cannot be known."""

    value: float
    error: float | None


@dataclass(frozen=True)
class PerExampleResults:
    """What a model did on held-out data, in pieces (examples, sentences, batches of running text).

    Attributes:
      task: name of the task, whose measures apply.
      columns: one number a piece by name (`nats` and `bytes`, `true` and `predicted`, …), see the task's `quality`.
      classes: of a classification.

    >>> text = PerExampleResults("causal", {"nats": (693.147, 1386.294), "tokens": (250, 500), "bytes": (1000, 2000)})
    >>> [round(text.estimate(measure).value, 3) for measure in text.measures]
    [1.0, 16.0]
    """

    task: str
    columns: Mapping[str, tuple[float, ...]]
    classes: int = 0

    def __post_init__(self):
        lookup(TASKS, self.task, "task")
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) != 1 or not max(sizes.values(), default=0):
            raise ValueError(f"held-out data: all columns must list the same pieces, at least one; there are {sizes}")
        for name in ("tokens", "bytes", "words"):
            if name in self.columns and sum(self.columns[name]) <= 0:
                raise ValueError(f"held-out data without {name} measures nothing")

    @property
    def measures(self) -> tuple[Metric, ...]:
        """The quality, and what stands beside it."""
        return TASKS[self.task].quality.measures

    @property
    def pieces(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def quality(self) -> Estimate:
        """The first measure of the task."""
        return self.estimate(self.measures[0])

    @property
    def agreement(self) -> Estimate | None:
        """How far predictions are the teacher's, `None` where there is no teacher."""
        known = {"compared", "teacher"} & self.columns.keys()
        return self.estimate(TASKS[self.task].quality.agreement) if known else None

    def sums(self, measure: Metric) -> np.ndarray:
        """float64 `[pieces, k]`: what each piece adds to a measure."""
        return measure.sums({name: np.asarray(column) for name, column in self.columns.items()}, self.classes)

    def estimate(self, measure: Metric) -> Estimate:
        """A measure over all pieces."""
        sums = self.sums(measure)
        return _estimate(float(measure.value(sums.sum(axis=0))), left_out(measure, sums))


def left_out(measure: Metric, sums: np.ndarray) -> np.ndarray:
    """The measure without each of the pieces in turn: `[pieces]`."""
    with np.errstate(invalid="ignore", divide="ignore"):  # of a single piece nothing is left
        return measure.value(sums.sum(axis=0) - sums)


def _estimate(value: float, without: np.ndarray) -> Estimate:
    """A value with the jackknife's error: `2 sqrt((n-1)/n Σ(θ_i - mean θ)²)`, θ_i being the value without piece i.

    Equal to the usual error for a mean, and close to the bootstrap's for smooth functions of means (Efron and Stein
    1981). Of a difference between two models that read the same pieces, θ_i is the difference without the piece: what
    is hard for both then cancels.
    """
    pieces = len(without)
    if pieces < 2 or not (math.isfinite(value) and np.isfinite(without).all()):
        return Estimate(value, None)
    return Estimate(value, 2 * float(np.sqrt((pieces - 1) / pieces * np.square(without - without.mean()).sum())))


def difference(a: PerExampleResults, b: PerExampleResults, measure: Metric | None = None) -> Estimate:
    """A measure (by default the quality) of `a` minus that of `b`, paired by piece.

    Running text that two tokenizers cut differently has no common pieces: both errors are then added as if the models
    had read different texts of one kind. Where only one of the two is not a number, the difference is infinite in
    favour of the other.

    Raises:
      ValueError: for models that did not read the same data.
    """
    measure = measure or a.measures[0]
    same = TASKS[a.task].quality.same
    if a.task != b.task or not _same(a, b, same):
        raise ValueError(f"measured on different held-out data: the pieces of {a.task} and {b.task} differ in {same}")
    here, there = a.estimate(measure), b.estimate(measure)
    broken = [math.isnan(here.value), math.isnan(there.value)]
    if broken == [False, True]:
        return Estimate(math.inf if measure.higher else -math.inf, None)
    change = here.value - there.value
    if a.columns[same] == b.columns[same]:
        return _estimate(change, left_out(measure, a.sums(measure)) - left_out(measure, b.sums(measure)))
    known = here.error is not None and there.error is not None
    return Estimate(change, math.hypot(here.error or 0, there.error or 0) if known else None)


def _same(a: PerExampleResults, b: PerExampleResults, name: str) -> bool:
    """Whether two models read the same: equal piece by piece, or as many bytes of text."""
    if a.columns[name] == b.columns[name]:
        return True
    return name == "bytes" and math.isclose(sum(a.columns[name]), sum(b.columns[name]), rel_tol=0.01)


def combine(function: Callable[..., Any], *held_out: PerExampleResults, measure: Metric | None = None) -> Estimate:
    """A function of several models' measures, with the error of leaving the same piece out of all of them.

    What is asked of compression is often a ratio: the share of a teacher's score, the part of a loss that was won back.

    Args:
      function: of numpy arrays, one a model.
      measure: the quality by default.
    """
    first = held_out[0]
    measure = measure or first.measures[0]
    for other in held_out[1:]:
        difference(first, other, measure)  # refuses models that did not read the same
    sums = [each.sums(measure) for each in held_out]
    value = float(function(*(measure.value(each.sum(axis=0)) for each in sums)))
    same = TASKS[first.task].quality.same
    if any(each.columns[same] != first.columns[same] for each in held_out):
        return Estimate(value, None)
    return _estimate(value, np.asarray(function(*(left_out(measure, each) for each in sums))))
