"""Sentences for people: what each model won, where it won nothing, and which one to ship."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlm.evaluate.comparison import Comparison, ModelResult, against_reference, by_name, compare, dominates
from jaxlm.evaluate.per_example import Estimate
from jaxlm.evaluate.timing import Ratio
from jaxlm.report.formatting import estimate, one_line, scaled, spread, times
from jaxlm.tasks import Metric

WORDS = {
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

MANY = 10
"""Models of which a paragraph cannot tell everything."""


def quality_words(measure: Metric | None) -> dict[int, str]:
    """What a better, an equal and a worse model is called."""
    better, equal, worse = measure.words if measure else ("better", "as good", "worse")
    return {1: better, 0: equal, -1: worse}


class Finding(NamedTuple):
    """A few words on one aspect, and whether it was won (1), equal (0), lost (-1) or not measured (`None`)."""

    words: str
    outcome: int | None


def findings(comparison: Comparison, measure: Metric | None) -> list[Finding]:
    """Size, speed and quality in a few words each; batches and batch 1 apart where they differ."""
    outcome = comparison.outcomes()
    speed, latency = outcome["speed"], outcome["latency"]
    found = [Finding(WORDS["size"][outcome["size"] or 0], outcome["size"])]
    if speed is None and latency is None:
        found.append(Finding("not timed", None))
    elif speed == latency:
        found.append(Finding(WORDS["speed"][speed or 0], speed))
    else:
        both = ((speed, "in batches"), (latency, "at batch 1"))
        found += [Finding(f"{WORDS['speed'][won]} {where}", won) for won, where in both if won is not None]
    quality = outcome["quality"]
    found.append(Finding("quality not measured" if quality is None else quality_words(measure)[quality], quality))
    return found


def chips(row: ModelResult, rows: Mapping[str, ModelResult]) -> list[Finding]:
    """The findings against the row's reference; none for the reference itself."""
    comparison = against_reference(row, rows)
    return [] if comparison is None else findings(comparison, row.measure)


def described(row: ModelResult, rows: Mapping[str, ModelResult]) -> list[str]:
    """The sentences of one model: against its reference, then against those it stands beside."""
    if row.reference is not None:
        lost = won_nothing(row, rows[row.reference])
        return [*(sentence(row, rows[name]) for name in (row.reference, *row.beside)), *([lost] if lost else [])]
    used = any(other.reference == row.name for other in rows.values())
    first = "The reference that the others are compared with." if used else "Compared with no other model."
    return [first, *(sentence(row, rows[name]) for name in row.beside)]


def won_nothing(row: ModelResult, other: ModelResult) -> str:
    """The line that says plainly where nothing was won against another model; "" where all was."""
    lost = [ASPECTS[aspect] for aspect, won in compare(row, other).outcomes().items() if won in (0, -1)]
    return f"Nothing won in {_and(lost)}." if lost else ""


def sentence(row: ModelResult, other: ModelResult) -> str:
    """What `row` won against `other`, and where it won nothing, with the numbers."""
    comparison = compare(row, other)
    outcome = comparison.outcomes()
    numbers = [
        _size(row, other, comparison.size),
        _speed(comparison.speed, outcome["speed"], "in batches"),
        _speed(comparison.latency, outcome["latency"], "at batch 1"),
        _quality(comparison.quality, outcome["quality"], row.measure),
    ]
    gained = gist(findings(comparison, row.measure), row.measure)
    return f"Against {one_line(other.name)} it is {gained}: {', '.join(numbers)}."


def gist(found: Sequence[Finding], measure: Metric | None = None) -> str:
    """Findings as one phrase.

    >>> gist([Finding("smaller", 1), Finding("no faster", 0), Finding("worse at text", -1)])
    'smaller, but no faster and worse at text'
    >>> gist([Finding("larger", -1), Finding("slower", -1)])
    'larger and slower, and wins nothing'
    >>> gist([Finding("smaller", 1), Finding("slower", -1), Finding("as good", 0)])
    'smaller and as good, but slower'
    """
    won = [f.words for f in found if f.outcome == 1]
    rest = [f.words for f in found if f.outcome in (0, -1)]
    if not won:
        return f"{_and(rest)}, and wins nothing"
    if (kept := quality_words(measure)[0]) in rest:  # no gain, but what one hopes for from a smaller model
        won, rest = [*won, kept], [words for words in rest if words != kept]
    return f"{_and(won)}, but {_and(rest)}" if rest else _and(won)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _size(row: ModelResult, other: ModelResult, ratio: float) -> str:
    here, there = scaled(row.bytes_on_disk, "B"), scaled(other.bytes_on_disk, "B")
    if here == there:
        return here
    return f"{here} instead of {there} ({times(ratio)} smaller)" if ratio > 1 else f"{here} instead of {there}"


def _speed(r: Ratio | None, outcome: int | None, where: str) -> str:
    if r is None:
        return f"not timed {where}"
    only = "only " if outcome == -1 else ""
    noise = ": no difference beyond noise" if outcome == 0 else ""
    return f"{only}{times(r.median)} as fast {where} ({spread(r)}{noise})"


def _quality(change: Estimate | None, outcome: int | None, measure: Metric | None) -> str:
    if change is None or measure is None:
        return "quality not measured"
    if not math.isfinite(change.value):
        return "the other's predictions are not numbers" if outcome == 1 else "its predictions are not numbers"
    if outcome == 0:
        return f"{measure.unit} equal within error ({estimate(change, measure, signed=True)})"
    size = estimate(change._replace(value=abs(change.value)), measure, signed=True).removeprefix("+")
    return f"{size} {_direction(change.value, measure)} {measure.unit}"


def _direction(change: float, measure: Metric) -> str:
    if change > 0:
        return "more"
    return "fewer" if measure.unit.startswith(("bits", "nats")) else "less"


class Pick(NamedTuple):
    """A recommendation: the wish, the model that serves it, and the numbers."""

    wish: str
    name: str
    numbers: str


def picks(rows: Sequence[ModelResult], tolerance: float) -> list[Pick]:
    """The best model; the smallest and the fastest within the tolerance of the reference's quality (`near_enough`).

    A model is picked for its size or speed only where it beats the reference beyond noise, and never when another model
    beats or equals it in everything. No picks without the quality of the reference.
    """
    reference = _reference(rows)
    measure = reference.measure
    if measure is None or not math.isfinite(_value(reference)):
        return []
    measured = [row for row in rows if math.isfinite(_value(row))]
    sound = [row for row in measured if not any(dominates(other, row) for other in rows)] or measured
    best = (max if measure.higher else min)(sound, key=_value)
    found = [Pick(measure.best, best.name, _amount(best, measure))]
    near = [row for row in sound if near_enough(_value(row), _value(reference), measure, tolerance)]
    if smaller := _winners(near, reference, "size"):
        row = min(smaller, key=lambda row: row.bytes_on_disk)
        gain = f"{times(compare(row, reference).size)} smaller"
        found.append(Pick("Smallest", row.name, f"{gain}, {_change(row, reference)}"))
    if faster := _winners(near, reference, "speed"):
        speeds = {row.name: speed.median for row in faster if (speed := compare(row, reference).speed)}
        row = max(faster, key=lambda row: speeds[row.name])
        found.append(Pick("Fastest", row.name, f"{times(speeds[row.name])} as fast, {_change(row, reference)}"))
    return found


def near_enough(value: float, reference: float, measure: Metric, tolerance: float) -> bool:
    """Whether a quality is at most the fraction `tolerance` of the reference's worse than that."""
    return (reference - value if measure.higher else value - reference) <= tolerance * abs(reference)


def _amount(row: ModelResult, measure: Metric) -> str:
    """`2.193 ± 0.012 bits per byte`, `91.3 ± 1.3% accuracy`."""
    return f"{estimate(row.quality, measure)} {measure.unit}"


def _reference(rows: Sequence[ModelResult]) -> ModelResult:
    """The row that most rows are compared with."""
    named = [row.reference for row in rows if row.reference]
    return by_name(rows)[max(named, key=named.count)] if named else rows[0]


def _winners(rows: Sequence[ModelResult], reference: ModelResult, aspect: str) -> list[ModelResult]:
    return [row for row in rows if row is not reference and compare(row, reference).outcomes()[aspect] == 1]


def _value(row: ModelResult) -> float:
    """Its quality, NaN where that was not measured."""
    return math.nan if row.quality is None else row.quality.value


def _change(row: ModelResult, reference: ModelResult) -> str:
    """Its quality beside the reference's: `2.4% more bits per byte`, `98.7% of the accuracy`."""
    assert reference.measure is not None
    share = 100 * _value(row) / _value(reference)
    if reference.measure.higher:
        return f"{share:.1f}% of the {reference.measure.unit}"
    return f"{abs(share - 100):.1f}% {_direction(share - 100, reference.measure)} {reference.measure.unit}"


def verdict(rows: Sequence[ModelResult], tolerance: float) -> str:
    """The paragraph at the top: which model to ship for what, and which not at all.

    Of more than `MANY` models it only names those that another one beats; every model has its own lines further down.
    """
    by_name(rows)
    if len(rows) == 1:
        return f"One model only, {one_line(rows[0].name)}: there is nothing to compare it with."
    found = {pick.wish: pick for pick in picks(rows, tolerance)}
    text = (
        _advice(rows, found, tolerance)
        if found
        else ["No model is recommended: the reference has no measured quality."]
    )
    many, beaten = len(rows) > MANY, []
    for row in rows:
        better = next((other for other in rows if other is not row and dominates(other, row)), None)
        for name in () if many else row.beside:
            other = next(other for other in rows if other.name == name)
            gained = gist(findings(compare(row, other), row.measure), row.measure)
            text.append(f"Beside {one_line(name)}, {one_line(row.name)} is {gained}.")
        if row.held_out is not None and math.isnan(_value(row)):
            text.append(f"Do not ship {one_line(row.name)}: its predictions are not numbers.")
        elif better is not None and many:
            beaten.append(f"{one_line(row.name)} ({one_line(better.name)})")
        elif better is not None:
            text.append(_beaten(row, better))
    if beaten:
        text.append(f"Nothing speaks for {_and(beaten)}: that in brackets is as good in every way and better in one.")
    return " ".join(text)


def _advice(rows: Sequence[ModelResult], found: Mapping[str, Pick], tolerance: float) -> list[str]:
    reference = _reference(rows)
    measure = reference.measure
    assert measure is not None
    small, fast, best = found.get("Smallest"), found.get("Fastest"), found[measure.best]
    if small and fast and small.name == fast.name:
        speed = fast.numbers.split(", ")[0]
        advice = f"ship {one_line(small.name)}, both the smallest and the fastest ({speed}, {small.numbers})"
    else:
        for_size = f"for size ship {one_line(small.name)} ({small.numbers})" if small else _nothing(rows, "size")
        for_speed = f"for speed ship {one_line(fast.name)} ({fast.numbers})" if fast else _nothing(rows, "speed")
        advice = f"{for_size}; {for_speed}"
    name = one_line(reference.name)
    if measure.higher:
        condition = f"Keeping at least {100 * (1 - tolerance):g}% of the {measure.unit} of {name}"
    else:
        condition = f"Allowing {100 * tolerance:g}% more {measure.unit} than {name}"
    return [f"{condition}: {advice}.", f"{measure.best}: {one_line(best.name)} ({best.numbers})."]


def _nothing(rows: Sequence[ModelResult], aspect: str) -> str:
    """That no model is within the tolerance, and the least bad of those that did win the aspect."""
    reference, word = _reference(rows), WORDS[aspect][1]
    assert reference.measure is not None
    winners = [row for row in _winners(rows, reference, aspect) if math.isfinite(_value(row))]
    if not winners:
        return f"nothing is {word}"
    row = (max if reference.measure.higher else min)(winners, key=_value)
    return f"nothing is {word} (the closest is {one_line(row.name)}, {_change(row, reference)})"


def _beaten(row: ModelResult, by: ModelResult) -> str:
    outcome, quality = compare(by, row).outcomes(), quality_words(row.measure)
    equal = [word for key, word in (EQUAL | {"quality": quality[0]}).items() if outcome[key] == 0]
    wins = [words[1] for key, words in (WORDS | {"quality": quality}).items() if outcome[key] == 1]
    return f"Nothing speaks for {one_line(row.name)}: {one_line(by.name)} is {_and([*equal, *wins])}."
