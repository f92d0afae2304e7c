"""Sentences for people: what each model won, where it won nothing, and which one to ship."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlm.evaluate.row import Comparison, Estimate, Row, against_reference, by_name, compare, dominates
from jaxlm.evaluate.timing import Ratio
from jaxlm.evaluate.words import estimate, one_line, scaled, spread, times

WORDS = {
    "size": {1: "smaller", 0: "no smaller", -1: "larger"},
    "speed": {1: "faster", 0: "no faster", -1: "slower"},
    "quality": {1: "better at text", 0: "as good at text", -1: "worse at text"},
}
EQUAL = {"size": "as small", "speed": "as fast", "quality": "as good at text"}


class Finding(NamedTuple):
    """A few words on one aspect, and whether it was won (1), equal (0), lost (-1) or not measured (`None`)."""

    words: str
    outcome: int | None


def findings(comparison: Comparison) -> list[Finding]:
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
    found.append(Finding("quality not measured" if quality is None else WORDS["quality"][quality], quality))
    return found


def chips(row: Row, rows: Mapping[str, Row]) -> list[Finding]:
    """The findings against the row's reference; none for the reference itself."""
    comparison = against_reference(row, rows)
    return [] if comparison is None else findings(comparison)


def described(row: Row, rows: Mapping[str, Row]) -> list[str]:
    """The sentences of one model: against its reference, then against those it stands beside."""
    if row.reference is not None:
        return [sentence(row, rows[name]) for name in (row.reference, *row.beside)]
    used = any(other.reference == row.name for other in rows.values())
    first = "The reference that the others are compared with." if used else "Compared with no other model."
    return [first, *(sentence(row, rows[name]) for name in row.beside)]


def sentence(row: Row, other: Row) -> str:
    """What `row` won against `other`, and where it won nothing, with the numbers."""
    comparison = compare(row, other)
    outcome = comparison.outcomes()
    numbers = [
        _size(row, other, comparison.size),
        _speed(comparison.speed, outcome["speed"], "in batches"),
        _speed(comparison.latency, outcome["latency"], "at batch 1"),
        _quality(comparison.quality, outcome["quality"]),
    ]
    return f"Against {one_line(other.name)} it is {gist(findings(comparison))}: {', '.join(numbers)}."


def gist(found: Sequence[Finding]) -> str:
    """Findings as one phrase.

    >>> gist([Finding("smaller", 1), Finding("no faster", 0), Finding("worse at text", -1)])
    'smaller, but no faster and worse at text'
    >>> gist([Finding("larger", -1), Finding("slower", -1)])
    'larger and slower, and wins nothing'
    >>> gist([Finding("smaller", 1), Finding("slower", -1), Finding("as good at text", 0)])
    'smaller and as good at text, but slower'
    """
    won = [f.words for f in found if f.outcome == 1]
    rest = [f.words for f in found if f.outcome in (0, -1)]
    if not won:
        return f"{_and(rest)}, and wins nothing"
    if (kept := WORDS["quality"][0]) in rest:  # no gain, but what one hopes for from a smaller model
        won, rest = [*won, kept], [words for words in rest if words != kept]
    return f"{_and(won)}, but {_and(rest)}" if rest else _and(won)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _size(row: Row, other: Row, ratio: float) -> str:
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


def _quality(change: Estimate | None, outcome: int | None) -> str:
    if change is None:
        return "quality not measured"
    if not math.isfinite(change.value):
        return "the other's predictions are not numbers" if outcome == 1 else "its predictions are not numbers"
    if outcome == 0:
        return f"bits per byte equal within error ({estimate(change, signed=True)})"
    size = estimate(change._replace(value=abs(change.value)))
    return f"{size} {'fewer' if outcome == 1 else 'more'} bits per byte"


class Pick(NamedTuple):
    """A recommendation: the wish, the model that serves it, and the numbers."""

    wish: str
    name: str
    numbers: str


def picks(rows: Sequence[Row], tolerance: float) -> list[Pick]:
    """The best text; the smallest and the fastest model within `1 + tolerance` times the reference's bits per byte.

    A model is picked for its size or speed only where it beats the reference beyond noise, and never when another model
    beats or equals it in everything. No picks without the quality of the reference.
    """
    reference = _reference(rows)
    if not math.isfinite(_bits(reference)):
        return []
    measured = [row for row in rows if math.isfinite(_bits(row))]
    sound = [row for row in measured if not any(dominates(other, row) for other in rows)] or measured
    best = min(sound, key=_bits)
    found = [Pick("Best text", best.name, f"{estimate(best.bits_per_byte)} bits per byte")]
    near = [row for row in sound if _bits(row) <= _bits(reference) * (1 + tolerance)]
    if smaller := _winners(near, reference, "size"):
        row = min(smaller, key=lambda row: row.bytes_on_disk)
        gain = f"{times(compare(row, reference).size)} smaller"
        found.append(Pick("Smallest", row.name, f"{gain}, {_change(row, reference)}"))
    if faster := _winners(near, reference, "speed"):
        speeds = {row.name: speed.median for row in faster if (speed := compare(row, reference).speed)}
        row = max(faster, key=lambda row: speeds[row.name])
        found.append(Pick("Fastest", row.name, f"{times(speeds[row.name])} as fast, {_change(row, reference)}"))
    return found


def _reference(rows: Sequence[Row]) -> Row:
    """The row that most rows are compared with."""
    named = [row.reference for row in rows if row.reference]
    return by_name(rows)[max(named, key=named.count)] if named else rows[0]


def _winners(rows: Sequence[Row], reference: Row, aspect: str) -> list[Row]:
    return [row for row in rows if row is not reference and compare(row, reference).outcomes()[aspect] == 1]


def _bits(row: Row) -> float:
    """Bits per byte, NaN where they were not measured."""
    return math.nan if row.bits_per_byte is None else row.bits_per_byte.value


def _change(row: Row, reference: Row) -> str:
    """Its bits per byte beside the reference's: `2.4% more bits per byte`."""
    change = 100 * (_bits(row) / _bits(reference) - 1)
    return f"{abs(change):.1f}% {'more' if change > 0 else 'fewer'} bits per byte"


def verdict(rows: Sequence[Row], tolerance: float) -> str:
    """The paragraph at the top: which model to ship for what, and which not at all."""
    by_name(rows)
    if len(rows) == 1:
        return f"One model only, {one_line(rows[0].name)}: there is nothing to compare it with."
    found = {pick.wish: pick for pick in picks(rows, tolerance)}
    text = (
        _advice(rows, found, tolerance) if found else ["No model is recommended: the reference has no quality on text."]
    )
    for row in rows:
        better = next((other for other in rows if other is not row and dominates(other, row)), None)
        for name in row.beside:
            other = next(other for other in rows if other.name == name)
            text.append(f"Beside {one_line(name)}, {one_line(row.name)} is {gist(findings(compare(row, other)))}.")
        if row.held_out is not None and math.isnan(_bits(row)):
            text.append(f"Do not ship {one_line(row.name)}: its predictions are not numbers.")
        elif better is not None:
            text.append(_beaten(row, better))
    return " ".join(text)


def _advice(rows: Sequence[Row], found: Mapping[str, Pick], tolerance: float) -> list[str]:
    reference = _reference(rows)
    small, fast, best = found.get("Smallest"), found.get("Fastest"), found["Best text"]
    if small and fast and small.name == fast.name:
        speed = fast.numbers.split(", ")[0]
        advice = f"ship {one_line(small.name)}, both the smallest and the fastest ({speed}, {small.numbers})"
    else:
        for_size = f"for size ship {one_line(small.name)} ({small.numbers})" if small else _nothing(rows, "size")
        for_speed = f"for speed ship {one_line(fast.name)} ({fast.numbers})" if fast else _nothing(rows, "speed")
        advice = f"{for_size}; {for_speed}"
    return [
        f"Allowing {100 * tolerance:g}% more bits per byte than {one_line(reference.name)}: {advice}.",
        f"The best text comes from {one_line(best.name)} ({best.numbers}).",
    ]


def _nothing(rows: Sequence[Row], aspect: str) -> str:
    """That no model is within the tolerance, and the least bad of those that did win the aspect."""
    reference, word = _reference(rows), WORDS[aspect][1]
    winners = [row for row in _winners(rows, reference, aspect) if math.isfinite(_bits(row))]
    if not winners:
        return f"nothing is {word}"
    row = min(winners, key=_bits)
    return f"nothing is {word} (the closest is {one_line(row.name)}, {_change(row, reference)})"


def _beaten(row: Row, by: Row) -> str:
    outcome = compare(by, row).outcomes()
    equal = [word for key, word in EQUAL.items() if outcome[key] == 0]
    wins = [words[1] for key, words in WORDS.items() if outcome[key] == 1]
    return f"Nothing speaks for {one_line(row.name)}: {one_line(by.name)} is {_and([*equal, *wins])}."
