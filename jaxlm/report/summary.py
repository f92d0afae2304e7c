"""Sentences for people: what each model gains and where it gains nothing, and which one to ship."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlm.evaluate.comparison import Comparison, ModelResult, against_reference, by_name, compare, dominates
from jaxlm.evaluate.per_example import Estimate
from jaxlm.evaluate.timing import Ratio
from jaxlm.report.formatting import estimate, one_line, scaled, spread, times
from jaxlm.tasks import Metric

COMPARATIVES = {
    "size": {1: "smaller", 0: "no smaller", -1: "larger"},
    "speed": {1: "faster", 0: "no faster", -1: "slower"},
}
EQUAL = {"size": "as small", "speed": "as fast"}
ASPECTS = {
    "size": "size on disk",
    "speed": "speed in batches",
    "latency": "latency at batch 1",
    "quality": "quality",
}

NO_GAIN = "No gain in "
"""How the line of a model's negative results begins."""
MANY = 10
"""Models of which a paragraph cannot tell everything."""


def quality_comparatives(metric: Metric | None) -> dict[int, str]:
    """What a better, an equal and a worse model is called."""
    better, equal, worse = metric.comparatives if metric else ("better", "as good", "worse")
    return {1: better, 0: equal, -1: worse}


class Finding(NamedTuple):
    """One aspect in a few words, and whether it is better (1), equal (0), worse (-1) or not measured (`None`)."""

    phrase: str
    outcome: int | None


def findings(comparison: Comparison, metric: Metric | None) -> list[Finding]:
    """Size, speed and quality in a few words each; batches and batch 1 apart where they differ."""
    outcomes = comparison.outcomes()
    speed, latency, quality = outcomes["speed"], outcomes["latency"], outcomes["quality"]
    aspects = [Finding(COMPARATIVES["size"][outcomes["size"] or 0], outcomes["size"])]
    if speed is None and latency is None:
        aspects.append(Finding("not timed", None))
    elif speed == latency:
        aspects.append(Finding(COMPARATIVES["speed"][speed or 0], speed))
    else:
        both = ((speed, "in batches"), (latency, "at batch 1"))
        aspects += [
            Finding(f"{COMPARATIVES['speed'][outcome]} {setting}", outcome)
            for outcome, setting in both
            if outcome is not None
        ]
    phrase = "quality not measured" if quality is None else quality_comparatives(metric)[quality]
    return [*aspects, Finding(phrase, quality)]


def badges(row: ModelResult, rows: Mapping[str, ModelResult]) -> list[Finding]:
    """The findings against the row's reference; none for the reference itself."""
    comparison = against_reference(row, rows)
    return [] if comparison is None else findings(comparison, row.metric)


def described(row: ModelResult, rows: Mapping[str, ModelResult]) -> list[str]:
    """The sentences of one model: against its reference, then against those it stands beside."""
    if row.reference is not None:
        negative = no_gain(row, rows[row.reference])
        return [
            *(sentence(row, rows[name]) for name in (row.reference, *row.beside)),
            *([negative] if negative else []),
        ]
    used = any(other.reference == row.name for other in rows.values())
    first = "The reference that the others are compared with." if used else "Compared with no other model."
    return [first, *(sentence(row, rows[name]) for name in row.beside)]


def no_gain(row: ModelResult, other: ModelResult) -> str:
    """The negative results against another model in one line, "" where there are none."""
    aspects = [ASPECTS[aspect] for aspect, outcome in compare(row, other).outcomes().items() if outcome in (0, -1)]
    return f"{NO_GAIN}{_and(aspects)}." if aspects else ""


def sentence(row: ModelResult, other: ModelResult) -> str:
    """What `row` gains against `other`, and where it gains nothing, with the numbers."""
    comparison = compare(row, other)
    outcome = comparison.outcomes()
    numbers = [
        _size(row, other, comparison.size),
        _speed(comparison.speed, outcome["speed"], "in batches"),
        _speed(comparison.latency, outcome["latency"], "at batch 1"),
        _quality(comparison.quality, outcome["quality"], row.metric),
    ]
    gains = summarize(findings(comparison, row.metric), row.metric)
    return f"Against {one_line(other.name)} it is {gains}: {', '.join(numbers)}."


def summarize(aspects: Sequence[Finding], metric: Metric | None = None) -> str:
    """Findings as one phrase.

    >>> summarize([Finding("smaller", 1), Finding("no faster", 0), Finding("worse at text", -1)])
    'smaller, but no faster and worse at text'
    >>> summarize([Finding("larger", -1), Finding("slower", -1)])
    'larger and slower, with no gain'
    >>> summarize([Finding("smaller", 1), Finding("slower", -1), Finding("as good", 0)])
    'smaller and as good, but slower'
    """
    gains = [finding.phrase for finding in aspects if finding.outcome == 1]
    rest = [finding.phrase for finding in aspects if finding.outcome in (0, -1)]
    if not gains:
        return f"{_and(rest)}, with no gain"
    if (kept := quality_comparatives(metric)[0]) in rest:  # no gain, but what one hopes for from a smaller model
        gains, rest = [*gains, kept], [phrase for phrase in rest if phrase != kept]
    return f"{_and(gains)}, but {_and(rest)}" if rest else _and(gains)


def _and(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _size(row: ModelResult, other: ModelResult, ratio: float) -> str:
    size, other_size = scaled(row.bytes_on_disk, "B"), scaled(other.bytes_on_disk, "B")
    if size == other_size:
        return size
    return (
        f"{size} instead of {other_size} ({times(ratio)} smaller)" if ratio > 1 else f"{size} instead of {other_size}"
    )


def _speed(r: Ratio | None, outcome: int | None, setting: str) -> str:
    if r is None:
        return f"not timed {setting}"
    only = "only " if outcome == -1 else ""
    noise = ": no difference beyond noise" if outcome == 0 else ""
    return f"{only}{times(r.median)} as fast {setting} ({spread(r)}{noise})"


def _quality(change: Estimate | None, outcome: int | None, metric: Metric | None) -> str:
    if change is None or metric is None:
        return "quality not measured"
    if not math.isfinite(change.value):
        return "the other's predictions are not numbers" if outcome == 1 else "its predictions are not numbers"
    if outcome == 0:
        return f"{metric.unit} equal within error ({estimate(change, metric, signed=True)})"
    size = estimate(change._replace(value=abs(change.value)), metric, signed=True).removeprefix("+")
    return f"{size} {_direction(change.value, metric)} {metric.unit}"


def _direction(change: float, metric: Metric) -> str:
    if change > 0:
        return "more"
    return "fewer" if metric.unit.startswith(("bits", "nats")) else "less"


class Recommendation(NamedTuple):
    """What is wished for, the model that serves it, and the numbers."""

    wish: str
    name: str
    numbers: str


def recommendations(rows: Sequence[ModelResult], tolerance: float) -> list[Recommendation]:
    """The best model; the smallest and the fastest within the tolerance of the reference's quality (`near_enough`).

    A model is recommended for its size or speed only where it beats the reference beyond noise, and never when another
    model dominates it. There are none without the quality of the reference.
    """
    reference = _reference(rows)
    metric = reference.metric
    if metric is None or not math.isfinite(_value(reference)):
        return []
    measured = [row for row in rows if math.isfinite(_value(row))]
    undominated = [row for row in measured if not any(dominates(other, row) for other in rows)] or measured
    best = (max if metric.higher else min)(undominated, key=_value)
    chosen = [Recommendation(metric.best, best.name, _amount(best, metric))]
    near = [row for row in undominated if near_enough(_value(row), _value(reference), metric, tolerance)]
    if smaller := _better(near, reference, "size"):
        row = min(smaller, key=lambda row: row.bytes_on_disk)
        gain = f"{times(compare(row, reference).size)} smaller"
        chosen.append(Recommendation("Smallest", row.name, f"{gain}, {_change(row, reference)}"))
    if faster := _better(near, reference, "speed"):
        speeds = {row.name: speed.median for row in faster if (speed := compare(row, reference).speed)}
        row = max(faster, key=lambda row: speeds[row.name])
        gain = f"{times(speeds[row.name])} as fast"
        chosen.append(Recommendation("Fastest", row.name, f"{gain}, {_change(row, reference)}"))
    return chosen


def near_enough(value: float, reference: float, metric: Metric, tolerance: float) -> bool:
    """Whether a quality is at most the fraction `tolerance` of the reference's worse than that."""
    return (reference - value if metric.higher else value - reference) <= tolerance * abs(reference)


def _amount(row: ModelResult, metric: Metric) -> str:
    """`2.193 ± 0.012 bits per byte`, `91.3 ± 1.3% accuracy`."""
    return f"{estimate(row.quality, metric)} {metric.unit}"


def _reference(rows: Sequence[ModelResult]) -> ModelResult:
    """The row that most rows are compared with."""
    references = [row.reference for row in rows if row.reference]
    return by_name(rows)[max(references, key=references.count)] if references else rows[0]


def _better(rows: Sequence[ModelResult], reference: ModelResult, aspect: str) -> list[ModelResult]:
    return [row for row in rows if row is not reference and compare(row, reference).outcomes()[aspect] == 1]


def _value(row: ModelResult) -> float:
    """Its quality, NaN where that was not measured."""
    return math.nan if row.quality is None else row.quality.value


def _change(row: ModelResult, reference: ModelResult) -> str:
    """Its quality beside the reference's, of 0 alone: `2.4% more bits per byte`, `98.7% of the accuracy`."""
    metric = reference.metric
    assert metric is not None
    if _value(reference) == 0:
        return _amount(row, metric)
    share = 100 * _value(row) / _value(reference)
    if metric.higher:
        return f"{share:.1f}% of the {metric.unit}"
    return f"{abs(share - 100):.1f}% {_direction(share - 100, metric)} {metric.unit}"


def summary(rows: Sequence[ModelResult], tolerance: float) -> str:
    """The paragraph at the top: which model to ship for what, and which not at all.

    Of more than `MANY` models it only names the dominated ones; every model has its own lines further down.
    """
    named = by_name(rows)
    if len(rows) == 1:
        return f"One model only, {one_line(rows[0].name)}: there is nothing to compare it with."
    chosen = {choice.wish: choice for choice in recommendations(rows, tolerance)}
    text = (
        _advice(rows, chosen, tolerance)
        if chosen
        else ["No model is recommended: the reference has no measured quality."]
    )
    many, dominated = len(rows) > MANY, []
    for row in rows:
        better = next((other for other in rows if other is not row and dominates(other, row)), None)
        for name in () if many else row.beside:
            gains = summarize(findings(compare(row, named[name]), row.metric), row.metric)
            text.append(f"Beside {one_line(name)}, {one_line(row.name)} is {gains}.")
        if row.held_out is not None and math.isnan(_value(row)):
            text.append(f"Do not ship {one_line(row.name)}: its predictions are not numbers.")
        elif better is not None and many:
            dominated.append(f"{one_line(row.name)} ({one_line(better.name)})")
        elif better is not None:
            text.append(_dominated(row, better))
    if dominated:
        text.append(f"Dominated by the model in brackets, equal or better in every way: {_and(dominated)}.")
    return " ".join(text)


def _advice(rows: Sequence[ModelResult], chosen: Mapping[str, Recommendation], tolerance: float) -> list[str]:
    reference = _reference(rows)
    metric = reference.metric
    assert metric is not None
    small, fast, best = chosen.get("Smallest"), chosen.get("Fastest"), chosen[metric.best]
    if small and fast and small.name == fast.name:
        speed = fast.numbers.split(", ")[0]
        advice = f"ship {one_line(small.name)}, both the smallest and the fastest ({speed}, {small.numbers})"
    else:
        for_size = f"for size ship {one_line(small.name)} ({small.numbers})" if small else _nothing(rows, "size")
        for_speed = f"for speed ship {one_line(fast.name)} ({fast.numbers})" if fast else _nothing(rows, "speed")
        advice = f"{for_size}; {for_speed}"
    name = one_line(reference.name)
    if metric.higher:
        condition = f"Keeping at least {100 * (1 - tolerance):g}% of the {metric.unit} of {name}"
    else:
        condition = f"Allowing {100 * tolerance:g}% more {metric.unit} than {name}"
    return [f"{condition}: {advice}.", f"{metric.best}: {one_line(best.name)} ({best.numbers})."]


def _nothing(rows: Sequence[ModelResult], aspect: str) -> str:
    """That no model within the tolerance is better in an aspect, and the least bad of those that are."""
    reference, comparative = _reference(rows), COMPARATIVES[aspect][1]
    assert reference.metric is not None
    better = [row for row in _better(rows, reference, aspect) if math.isfinite(_value(row))]
    if not better:
        return f"nothing is {comparative}"
    row = (max if reference.metric.higher else min)(better, key=_value)
    return f"nothing is {comparative} (the closest is {one_line(row.name)}, {_change(row, reference)})"


def _dominated(row: ModelResult, by: ModelResult) -> str:
    outcomes, quality = compare(by, row).outcomes(), quality_comparatives(row.metric)
    equal = [phrase for key, phrase in (EQUAL | {"quality": quality[0]}).items() if outcomes[key] == 0]
    better = [phrases[1] for key, phrases in (COMPARATIVES | {"quality": quality}).items() if outcomes[key] == 1]
    return f"{one_line(row.name)} is dominated by {one_line(by.name)}, which is {_and([*equal, *better])}."
