"""Places: where rows come from. A path, a glob or a named split, each with an optional slice suffix.

``input.txt[:90%]``, ``part-*.jsonl[1000:]``, ``stdlib[90%:]``: the suffix is the one of TensorFlow Datasets. Bounds are
row numbers or percentages, a negative bound counts from the end, and ``[:p]`` and ``[p:]`` share no row and lose none.
"""

import difflib
import glob
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_SUFFIX = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]$")


@dataclass(frozen=True)
class Slice:
    """Part of a sequence, ``[start:stop]``; each bound is None, a count such as ``"100"`` or a percentage ``"90%"``."""

    start: str | None = None
    stop: str | None = None

    def bounds(self, n: int, rounding: Callable[[float], int] = math.floor) -> tuple[int, int]:
        """The half-open range of rows that the slice takes from ``n`` rows, clipped to ``[0, n]``."""
        start = 0 if self.start is None else _position(self.start, n, rounding)
        stop = n if self.stop is None else _position(self.stop, n, rounding)
        return start, max(start, stop)

    @property
    def whole(self) -> bool:
        return self.start is None and self.stop is None

    @property
    def needs_count(self) -> bool:
        """Whether the bounds depend on the number of rows."""
        return any(b is not None and ("%" in b or b.startswith("-")) for b in (self.start, self.stop))


def _position(bound: str, n: int, rounding: Callable[[float], int]) -> int:
    value = int(bound.rstrip("%"))
    if bound.endswith("%"):
        if abs(value) > 100:
            raise ValueError(f"slice bound {bound!r} is beyond 100%")
        return rounding((value if value >= 0 and not bound.startswith("-") else 100 + value) * n / 100)
    return min(max(value if value >= 0 else n + value, 0), n)


def split_place(place: str) -> tuple[str, Slice]:
    """Separates a place from its slice suffix: ``"a.txt[:90%]"`` gives ``("a.txt", Slice(None, "90%"))``."""
    match = _SUFFIX.search(place)
    if match is None:
        return place, Slice()
    return place[: match.start()], Slice(match[1], match[2])


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest valid ones, or all when none is close."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
    return f"there is {shown}" if names else "there is none"


def find_files(place: str) -> list[str]:
    """The files that a path or a glob names, sorted; at least one, or FileNotFoundError with the nearest name."""
    path = os.path.expanduser(place)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        raise IsADirectoryError(f"{place!r} is a directory; name its files, for example {os.path.join(place, '*')!r}")
    if glob.has_magic(path):
        files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if files:
            return files
        raise FileNotFoundError(f"no file matches {place!r} (working directory {os.getcwd()!r})")
    if not place:
        raise FileNotFoundError("an empty place: name a file, a glob or a split")
    folder, name = os.path.split(path)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    where = folder or os.getcwd()
    raise FileNotFoundError(f"{place!r} does not exist: in {where!r}, {nearest(name, os.listdir(where))}")


def may_share(a: str, b: str) -> bool:
    """Whether two places may have a row in common.

    >>> may_share("corpus[:40%]", "corpus[98%:]"), may_share("corpus[:40%]", "corpus[30%:]")
    (False, True)
    """
    (bare_a, part_a), (bare_b, part_b) = split_place(a), split_place(b)
    files_a, files_b = _files(bare_a), _files(bare_b)
    if files_a.isdisjoint(files_b):
        return False
    return files_a != files_b or not (_ends_before(part_a, part_b) or _ends_before(part_b, part_a))


def _files(bare: str) -> frozenset[str]:
    """What a place names: its files, whatever they are called, or the name itself (`dataset:version:split`)."""
    path = os.path.expanduser(bare)
    found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    dataset, _, split = bare.rpartition(":")
    return frozenset(map(os.path.realpath, found)) or frozenset({f"{dataset.partition(':')[0]}:{split}"})


def _ends_before(first: Slice, second: Slice) -> bool:
    """Whether one slice ends before another begins, however many rows there are."""
    (share, rows), (other_share, other_rows) = _bound(first.stop, (1.0, 0)), _bound(second.start, (0.0, 0))
    return share <= other_share and rows <= other_rows


def _bound(bound: str | None, default: tuple[float, int]) -> tuple[float, int]:
    """A bound as `share · n + rows`."""
    if bound is None:
        return default
    value = int(bound.rstrip("%"))
    if bound.endswith("%"):
        return (value if not bound.startswith("-") else 100 + value) / 100, 0
    return (1.0, value) if bound.startswith("-") else (0.0, value)
