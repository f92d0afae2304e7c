"""Locations of rows: a path, a glob or a named split, each with an optional slice suffix.

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
    """Part of a sequence, ``[start:stop]``; a bound is None, a number of rows ``"100"`` or a percentage ``"90%"``."""

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


def split_location(location: str) -> tuple[str, Slice]:
    """Separates a location from its slice suffix: ``"a.txt[:90%]"`` gives ``("a.txt", Slice(None, "90%"))``."""
    match = _SUFFIX.search(location)
    if match is None:
        return location, Slice()
    return location[: match.start()], Slice(match[1], match[2])


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest valid ones, or all if none is close."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
    return f"there is {shown}" if names else "there is none"


def find_files(location: str) -> list[str]:
    """The files of a path or a glob, sorted; at least one, or FileNotFoundError with the nearest name."""
    path = os.path.expanduser(location)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        example = os.path.join(location, "*")
        raise IsADirectoryError(f"{location!r} is a directory; name its files, for example {example!r}")
    if glob.has_magic(path):
        files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if files:
            return files
        raise FileNotFoundError(f"no file matches {location!r} (working directory {os.getcwd()!r})")
    if not location:
        raise FileNotFoundError("an empty location: name a file, a glob or a split")
    folder, name = os.path.split(path)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    folder = folder or os.getcwd()
    raise FileNotFoundError(f"{location!r} does not exist: in {folder!r}, {nearest(name, os.listdir(folder))}")


def may_share(a: str, b: str) -> bool:
    """Whether two locations may have a row in common.

    >>> may_share("corpus[:40%]", "corpus[98%:]"), may_share("corpus[:40%]", "corpus[30%:]")
    (False, True)
    """
    (path_a, part_a), (path_b, part_b) = split_location(a), split_location(b)
    files_a, files_b = _files(path_a), _files(path_b)
    if files_a.isdisjoint(files_b):
        return False
    return files_a != files_b or not (_ends_before(part_a, part_b) or _ends_before(part_b, part_a))


def _files(location: str) -> frozenset[str]:
    """The real paths of the files of a location, or, of a split (`dataset:version:split`), `dataset:split`."""
    path = os.path.expanduser(location)
    paths = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    dataset, _, split = location.rpartition(":")
    return frozenset(map(os.path.realpath, paths)) or frozenset({f"{dataset.partition(':')[0]}:{split}"})


def _ends_before(first: Slice, second: Slice) -> bool:
    """Whether one slice ends before another begins, for any number of rows."""
    (stop_share, stop_rows), (start_share, start_rows) = _bound(first.stop, (1.0, 0)), _bound(second.start, (0.0, 0))
    return stop_share <= start_share and stop_rows <= start_rows


def _bound(bound: str | None, default: tuple[float, int]) -> tuple[float, int]:
    """`(share, rows)` of a bound `share · n + rows`."""
    if bound is None:
        return default
    value = int(bound.rstrip("%"))
    if bound.endswith("%"):
        return (value if not bound.startswith("-") else 100 + value) / 100, 0
    return (1.0, value) if bound.startswith("-") else (0.0, value)
