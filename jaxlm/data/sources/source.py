"""Rows: what a source yields, what it does with bad ones, and the reading of text files line by line."""

import functools
import gzip
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, TypeVar, cast

from jaxlm.data.sources.locations import Slice, nearest

Record = dict[str, Any]
T = TypeVar("T")


class Row(NamedTuple):
    """One row with its origin; ``record`` is None where the row is bad, and ``reason`` says why."""

    file: str
    line: int
    record: Record | None
    reason: str = ""


class BadRow(NamedTuple):
    """A row that could not be read: line numbers start at 1, as editors count."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Unusable(ValueError):
    """Why a row is of no use to whoever reads its record (see ``Source.usable``)."""


class BadRowError(ValueError):
    """Raised at the first bad row when ``bad_rows="stop"``."""

    def __init__(self, bad: BadRow):
        super().__init__(f"{bad}. Correct the row, or set bad_rows='skip' to count such rows and go on")
        self.bad = bad


@dataclass(frozen=True)
class Options:
    """What a format may be told: the names of the columns of a file without a header, and what one document is."""

    names: tuple[str, ...] | None = None
    documents: str = "file"


Stream = Callable[[], Iterator[Row]]  # called again for every pass
Reader = Callable[[str, Slice, Options], Stream]


class Source:
    """Records of one place, read anew (and lazily) on every pass.

    ``rows`` and ``bad`` describe the latest pass; asking for them before any pass makes one. Nothing is dropped
    silently: a bad row either stops the reading or stands in ``bad``.

    Attributes:
      columns_field: of the config, where columns are renamed: what an error about them names.
      evaluated: whether a model is measured on these records, and so every byte of their text is accounted for.
    """

    columns_field = "config.data.columns"
    evaluated = False

    def __init__(self, format: str, place: str, stream: Stream, rename: Mapping[str, str] | None, bad_rows: str):
        self.format, self.place = format, place
        self._stream, self._rename, self._stop = stream, dict(rename) if rename else None, bad_rows == "stop"
        self._rows: int | None = None
        self._bad: list[BadRow] = []

    def __iter__(self) -> Iterator[Record]:
        return (row.record for row in self.located() if row.record is not None)

    def located(self) -> Iterator[Row]:
        """Good rows together with their file and line, for a reader that may ``reject`` some of them."""
        self._rows, self._bad = None, []
        rows = 0
        for row in self._stream():
            if row.record is not None and self._rename:
                row = self._select(row)
            if row.record is None:
                self.reject(row, row.reason)
                continue
            bad = len(self._bad)
            yield row
            rows += len(self._bad) == bad  # not rejected by whoever took it
        self._rows = rows

    def usable(self, read: Callable[[Record], T], optional: Collection[str] = ()) -> Iterator[T]:
        """`read(record)` of every row; one of which it raises Unusable is a bad row, for the reason that it gives.

        Args:
          optional: columns that all rows must have or none, as what is made of them does.

        Raises:
          ValueError: where no row is usable, for the reason of the first.
        """
        having: frozenset[str] | None = None
        for row in self.located():
            assert row.record is not None
            try:
                value = read(row.record)
                columns = frozenset(row.record.keys() & set(optional))
                if having is not None and columns != having:
                    name = min(columns ^ having)
                    raise Unusable(
                        f"no column {name!r}, which the rows before have"
                        if name in having
                        else f"a column {name!r}, which the rows before do not have"
                    )
            except Unusable as error:
                self.reject(row, str(error))
                continue
            having = columns
            yield value
        if having is None:
            raise self.nothing_usable()

    def nothing_usable(self) -> ValueError:
        """What to raise after a pass that found no good row."""
        bad = f": all {len(self._bad)} are bad, the first at {self._bad[0]}" if self._bad else ""
        return ValueError(f"{self.place!r} ({self.format}) holds no usable row{bad}")

    def reject(self, row: Row, reason: str) -> None:
        """Marks a row as bad: raises BadRowError under "stop", else counts it. For rows that only a task can judge."""
        bad = BadRow(row.file, row.line, reason)
        if self._stop:
            raise BadRowError(bad)
        self._bad.append(bad)

    def _select(self, row: Row) -> Row:
        assert self._rename is not None and row.record is not None
        missing = [name for name in self._rename.values() if name not in row.record]
        if missing:
            return row._replace(record=None, reason=f"no column {missing[0]!r}; {nearest(missing[0], row.record)}")
        return row._replace(record={ours: row.record[theirs] for ours, theirs in self._rename.items()})

    @property
    def rows(self) -> int:
        """Number of good rows."""
        if self._rows is None:
            for _ in self.located():
                pass
        assert self._rows is not None
        return self._rows

    @property
    def bad(self) -> list[BadRow]:
        """Bad rows of the latest pass (empty under "stop", which raises instead)."""
        if self._rows is None:
            self.rows  # noqa: B018  (makes the pass that counts)
        return self._bad

    def __repr__(self) -> str:
        return f"Source(format={self.format!r}, place={self.place!r})"


def sliced(stream: Stream, part: Slice) -> Stream:
    """The part of a stream that a slice names; a percentage costs one more pass, to count."""
    if part.whole:
        return stream

    count = functools.cache(lambda: sum(1 for _ in stream()))

    def rows() -> Iterator[Row]:
        if part.needs_count:
            return itertools.islice(stream(), *part.bounds(count()))
        return itertools.islice(stream(), int(part.start or 0), None if part.stop is None else int(part.stop))

    return rows


def open_bytes(file: str) -> IO[bytes]:
    """A file's bytes; ``.gz`` is unpacked on the way."""
    return cast(IO[bytes], gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb"))


def lines(file: str) -> Iterator[str]:
    """Lines of a UTF-8 file without their line ends; a byte-order mark is dropped.

    Only ``\\n`` and ``\\r\\n`` end a line: form feeds and Unicode separators are part of the text.
    """
    return (line.rstrip("\n").removesuffix("\r") for line in whole_lines(file))


def whole_lines(file: str) -> Iterator[str]:
    """The same with their line ends."""
    with open_bytes(file) as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(file, number, error) from None


def not_utf8(file: str, line: int, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{file}:{line}: byte 0x{byte:02x} is not UTF-8; convert the file first, for example "
        f"`iconv -f latin1 -t utf-8` or `iconv -f gb18030 -t utf-8`"
    )
