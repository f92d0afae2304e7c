"""What is measured of one model, and how two models compare.

A Row carries raw measurements: seconds round by round, nats piece by piece. Ratios, intervals and verdicts are computed
from them here, paired with the same rounds and pieces of the other model, so that no table can contradict another.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxlm.evaluate.timing import Ratio, Timing, ratio

BEYOND = 0.02
"""A size or speed that differs by less than this fraction is called equal, however steady the clock was."""


class Estimate(NamedTuple):
    """A value and twice its standard error (about a 95% interval); `None` where it cannot be known."""

    value: float
    error: float | None


@dataclass(frozen=True)
class HeldOut:
    """What a model predicted on held-out text, in pieces (documents or batches), the same pieces for every model.

    Attributes:
      nats: summed negative log-likelihood of each piece.
      tokens: predicted tokens of each piece.
      bytes: UTF-8 bytes that those tokens stand for.
      agreed: tokens of each piece whose most likely prediction is the teacher's; `None` where there is no teacher.

    >>> text = HeldOut(nats=(693.147, 1386.294), tokens=(250, 500), bytes=(1000, 2000))
    >>> round(text.bits_per_byte.value, 3), round(text.perplexity, 2)
    (1.0, 16.0)
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    agreed: tuple[int, ...] | None = None

    def __post_init__(self):
        lengths = {
            len(self.nats),
            len(self.tokens),
            len(self.bytes),
            len(self.nats if self.agreed is None else self.agreed),
        }
        if len(lengths) != 1 or not self.nats:
            raise ValueError("nats, tokens, bytes and agreed must list the same pieces, at least one")
        if min(sum(self.tokens), sum(self.bytes)) <= 0:
            raise ValueError("held-out text without tokens or without bytes measures nothing")

    @property
    def bits_per_byte(self) -> Estimate:
        """`Σ nats / (ln 2 · Σ bytes)`, comparable across tokenizers."""
        return _ratio_of_sums(np.asarray(self.nats) / math.log(2), self.bytes)

    @property
    def perplexity(self) -> float:
        """`exp(Σ nats / Σ tokens)`, comparable only under one tokenizer; infinite rather than an overflow."""
        nats = sum(self.nats) / sum(self.tokens)
        return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan

    @property
    def agreement(self) -> Estimate | None:
        """Fraction of tokens on which the most likely prediction is the teacher's."""
        return None if self.agreed is None else _ratio_of_sums(self.agreed, self.tokens)


def _ratio_of_sums(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float]) -> Estimate:
    """`r = Σa / Σb` with twice `sqrt(n/(n-1) Σ(a_i - r b_i)²) / Σb`, the error over pieces drawn as wholes."""
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value, pieces = a.sum() / b.sum(), len(a)
    if pieces < 2 or not math.isfinite(value):
        return Estimate(float(value), None)
    spread = np.sqrt(pieces / (pieces - 1) * np.square(a - value * b).sum()) / b.sum()
    return Estimate(float(value), 2 * float(spread))


@dataclass(frozen=True)
class Row:
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
      held_out: predictions on held-out text.
      train_tokens: tokens it was trained on, those of its ancestors not counted.
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
    held_out: HeldOut | None = None
    train_tokens: int | None = None
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
    def bits_per_byte(self) -> Estimate | None:
        return None if self.held_out is None else self.held_out.bits_per_byte

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
      quality: bits per byte of this one - of the other, paired by piece: below 0 is better; -inf where only the other's
        are not a number.
    """

    size: float
    speed: Ratio | None
    latency: Ratio | None
    flops: float | None
    quality: Estimate | None

    def outcomes(self) -> dict[str, int | None]:
        """`size`, `speed`, `latency`, `quality`: 1 won, 0 equal within what can be told, -1 lost, `None` not measured.

        Speed and latency are won when their lower quartile is above 1 and their median beyond `BEYOND`; quality when
        the difference is larger than its error. A quality that is not a number is lost.
        """
        return {
            "size": _outcome(self.size, self.size, self.size),
            "speed": None if self.speed is None else _outcome(*self.speed),
            "latency": None if self.latency is None else _outcome(*self.latency),
            "quality": None if self.quality is None else _better(self.quality),
        }


def _outcome(median: float, low: float, high: float) -> int:
    if low > 1 and median > 1 + BEYOND:
        return 1
    return -1 if high < 1 and median < 1 / (1 + BEYOND) else 0


def _better(change: Estimate) -> int:
    if math.isnan(change.value):
        return -1
    if abs(change.value) <= (change.error or 0):
        return 0
    return 1 if change.value < 0 else -1


def compare(row: Row, other: Row) -> Comparison:
    """`row` against `other`, round by round and piece by piece."""
    return Comparison(
        size=other.bytes_on_disk / row.bytes_on_disk,
        speed=_speed(row, other),
        latency=ratio(other.single, row.single) if row.single and other.single else None,
        flops=other.flops_per_token / row.flops_per_token if row.flops_per_token and other.flops_per_token else None,
        quality=_quality(row, other),
    )


def _speed(row: Row, other: Row) -> Ratio | None:
    if row.batch is None or other.batch is None or row.batch_tokens is None or other.batch_tokens is None:
        return None
    tokens = row.batch_tokens / other.batch_tokens
    return Ratio(*(tokens * r for r in ratio(other.batch, row.batch)))


def _quality(row: Row, other: Row) -> Estimate | None:
    a, b = row.held_out, other.held_out
    if a is None or b is None:
        return None
    if a.bytes != b.bytes:
        raise ValueError(
            f"{row.name!r} and {other.name!r} were measured on different held-out text: pieces differ in bytes"
        )
    if math.isnan(sum(b.nats)) and not math.isnan(sum(a.nats)):
        return Estimate(-math.inf, None)
    return _ratio_of_sums((np.asarray(a.nats) - np.asarray(b.nats)) / math.log(2), a.bytes)


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by name, in order; ValueError for a name used twice, KeyError for a comparison with a missing row."""
    found = {row.name: row for row in rows}
    if not rows:
        raise ValueError("a report needs at least one row")
    if len(found) != len(rows):
        raise ValueError(f"row names must be unique: {[row.name for row in rows]}")
    for row in rows:
        for name in (*((row.reference,) if row.reference else ()), *row.beside):
            if name not in found:
                near = difflib.get_close_matches(name, found, n=3, cutoff=0.0)
                raise KeyError(f"row {row.name!r} is compared with {name!r}, which is not a row; nearest: {near}")
            if name == row.name:
                raise ValueError(f"row {row.name!r} is compared with itself; leave reference None")
    return found


def against_reference(row: Row, rows: Mapping[str, Row]) -> Comparison | None:
    """The comparison with its reference, `None` for the reference itself."""
    return None if row.reference is None else compare(row, rows[row.reference])


def dominates(a: Row, b: Row) -> bool:
    """Whether `a` is no worse than `b` in size, speed and quality, as far as can be told, and better in one of them."""
    outcomes = compare(a, b).outcomes()
    counted = [outcomes[key] for key in ("size", "speed", "quality")]
    return None not in counted and min(counted) >= 0 and max(counted) > 0  # type: ignore[type-var, operator]
