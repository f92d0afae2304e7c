"""What is measured of one model, and how two models compare.

A ModelResult carries raw measurements: seconds round by round, results example by example. Ratios, intervals and
outcomes are computed from them here, paired with the same rounds and examples of the other model, so that no table can
contradict another.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxlm.evaluate.per_example import Estimate, PerExampleResults, difference
from jaxlm.evaluate.timing import Ratio, Timing, ratio
from jaxlm.tasks import Metric

BEYOND = 0.02
"""A size or speed that differs by less than this fraction is called equal, however steady the clock was."""


class Layer(NamedTuple):
    """What is left of a layer.

    Attributes:
      name: its number, with `e` or `d` before it in an encoder-decoder.
      heads, groups, ffn: query heads, the KV groups that they share, and FFN units.
      width: of the residual stream.
      zeros: share of exact zeros in its kernels.
      bits: what the file spends on an entry of its kernels, scales and masks included.
    """

    name: str
    heads: int
    groups: int
    ffn: int
    width: int
    zeros: float
    bits: float


@dataclass(frozen=True)
class ModelResult:
    """One model of a report. What was not measured is `None` and is reported as such.

    Attributes:
      name: short and unique.
      description: one line: what was done to get it.
      parameters, parameters_non_embedding: counts (`cost.parameters`).
      bytes_on_disk: size of its weight files (`cost.bytes_on_disk`).
      bytes_by_dtype: bytes of its tensors by dtype (`cost.bytes_by_dtype`).
      reference: name of the row it is compared with, `None` for the reference itself.
      beside: further rows worth a sentence: what it replaces, or its control experiment.
      flops_per_token: forward pass (`cost.flops_per_token`).
      batch, batch_tokens: seconds of a forward pass over a batch, and the tokens in that batch.
      single: seconds of a forward pass at batch 1.
      compile_seconds: time to compile the pass over a batch.
      peak_bytes: memory that the compiled pass over a batch takes: parameters, input, temporaries, result.
      held_out: predictions on held-out data.
      layers: what is left of each layer.
      train_tokens: tokens it was trained on, those of its ancestors not counted.
      facts: what else there is to know, by name: calibration, a teacher's cache.
      prompt, sample: what it was asked to continue, and what it wrote.
      sample_tokens_per_second: generated tokens a second while writing it.
    """

    name: str
    description: str
    parameters: int
    parameters_non_embedding: int
    bytes_on_disk: int
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    reference: str | None = None
    beside: tuple[str, ...] = ()
    flops_per_token: float | None = None
    batch: Timing | None = None
    batch_tokens: int | None = None
    single: Timing | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    held_out: PerExampleResults | None = None
    layers: tuple[Layer, ...] = ()
    train_tokens: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    sample: str | None = None
    sample_tokens_per_second: float | None = None

    def __post_init__(self):
        if (self.batch is None) != (self.batch_tokens is None):
            raise ValueError(f"row {self.name!r}: batch and batch_tokens belong together, give both or neither")
        if self.bytes_on_disk <= 0:
            raise ValueError(
                f"row {self.name!r}: bytes_on_disk is {self.bytes_on_disk}; a model takes at least one byte"
            )

    @property
    def metric(self) -> Metric | None:
        """What its quality is measured in."""
        return None if self.held_out is None else self.held_out.metrics[0]

    @property
    def quality(self) -> Estimate | None:
        return None if self.held_out is None else self.held_out.quality

    @property
    def tokens_per_second(self) -> Ratio | None:
        """Median and quartiles over the rounds."""
        if self.batch is None or self.batch_tokens is None:
            return None
        seconds = self.batch
        return Ratio(*(self.batch_tokens / s for s in (seconds.median, seconds.high, seconds.low)))

    @property
    def latency_ms(self) -> Ratio | None:
        """Median and quartiles over the rounds."""
        return (
            None
            if self.single is None
            else Ratio(*(1e3 * s for s in (self.single.median, self.single.low, self.single.high)))
        )


class Comparison(NamedTuple):
    """One model against another. Ratios above 1 are in its favour; `None` where either was not measured.

    Attributes:
      size: bytes of the other / bytes of this one: times smaller.
      speed: tokens a second of this one / of the other, paired by round: times as fast in batches.
      latency: seconds of the other / of this one at batch 1, paired by round.
      flops: FLOPs per token of the other / of this one.
      quality: the metric of this one - of the other, paired by example; infinite where only one of them is a number.
      higher: whether a larger metric is better.
    """

    size: float
    speed: Ratio | None
    latency: Ratio | None
    flops: float | None
    quality: Estimate | None
    higher: bool = False

    def outcomes(self) -> dict[str, int | None]:
        """`size`, `speed`, `latency`, `quality`: 1 better, 0 equal within error, -1 worse, `None` not measured.

        Speed and latency are better when their lower quartile is above 1 and their median beyond `BEYOND`; quality when
        the difference is larger than its error. A quality that is not a number is worse.
        """
        return {
            "size": _outcome(self.size, self.size, self.size),
            "speed": None if self.speed is None else _outcome(*self.speed),
            "latency": None if self.latency is None else _outcome(*self.latency),
            "quality": None if self.quality is None else _better(self.quality, self.higher),
        }


def _outcome(median: float, low: float, high: float) -> int:
    if low > 1 and median > 1 + BEYOND:
        return 1
    return -1 if high < 1 and median < 1 / (1 + BEYOND) else 0


def _better(change: Estimate, higher: bool) -> int:
    if math.isnan(change.value):
        return -1
    if abs(change.value) <= (change.error or 0):
        return 0
    return 1 if (change.value > 0) == higher else -1


def compare(row: ModelResult, other: ModelResult) -> Comparison:
    """`row` against `other`, round by round and example by example."""
    return Comparison(
        size=other.bytes_on_disk / row.bytes_on_disk,
        speed=_speed(row, other),
        latency=ratio(other.single, row.single) if row.single and other.single else None,
        flops=other.flops_per_token / row.flops_per_token if row.flops_per_token and other.flops_per_token else None,
        quality=_quality(row, other),
        higher=row.metric is not None and row.metric.higher,
    )


def _speed(row: ModelResult, other: ModelResult) -> Ratio | None:
    if row.batch is None or other.batch is None or row.batch_tokens is None or other.batch_tokens is None:
        return None
    tokens = row.batch_tokens / other.batch_tokens
    return Ratio(*(tokens * r for r in ratio(other.batch, row.batch)))


def _quality(row: ModelResult, other: ModelResult) -> Estimate | None:
    if row.held_out is None or other.held_out is None:
        return None
    try:
        return difference(row.held_out, other.held_out)
    except ValueError as error:
        raise ValueError(f"{row.name!r} and {other.name!r} were {error}") from None


def by_name(rows: Sequence[ModelResult]) -> dict[str, ModelResult]:
    """Rows by name, in order; ValueError for a name used twice, KeyError for a comparison with a missing row."""
    named = {row.name: row for row in rows}
    if not rows:
        raise ValueError("a report needs at least one row")
    if len(named) != len(rows):
        raise ValueError(f"row names must be unique: {[row.name for row in rows]}")
    for row in rows:
        for name in (*((row.reference,) if row.reference else ()), *row.beside):
            if name not in named:
                near = difflib.get_close_matches(name, named, n=3, cutoff=0.0)
                raise KeyError(f"row {row.name!r} is compared with {name!r}, which is not a row; nearest: {near}")
            if name == row.name:
                raise ValueError(f"row {row.name!r} is compared with itself; leave reference None")
    return named


def against_reference(row: ModelResult, rows: Mapping[str, ModelResult]) -> Comparison | None:
    """The comparison with its reference, `None` for the reference itself."""
    return None if row.reference is None else compare(row, rows[row.reference])


def dominates(a: ModelResult, b: ModelResult) -> bool:
    """Whether `a` is no worse than `b` in size, speed and quality, within error, and better in one of them."""
    outcomes = compare(a, b).outcomes()
    measured = [outcome for key in ("size", "speed", "quality") if (outcome := outcomes[key]) is not None]
    return len(measured) == 3 and min(measured) >= 0 and max(measured) > 0
