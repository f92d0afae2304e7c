"""Sources: rows, the handling of bad ones, and the reading of text files line by line."""

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
    """One row with its file and line; ``record`` is None if the row is bad, and ``reason`` says why."""

    file: str
    line: int
    record: Record | None
    reason: str = ""


class BadRow(NamedTuple):
    """A row that could not be read; line numbers start at 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Unusable(ValueError):
    """Raised for a record that its reader cannot use; the message is the reason (see ``Source.usable``)."""


class BadRowError(ValueError):
    """Raised at the first bad row when ``bad_rows="stop"``."""

    def __init__(self, bad: BadRow):
        super().__init__(f"{bad}. Correct the row, or set bad_rows='skip' to count such rows and go on")
        self.bad = bad


@dataclass(frozen=True)
class Options:
    """Options of formats: the column names of a file without a header, and what one document of a text is."""

    names: tuple[str, ...] | None = None
    documents: str = "file"


Stream = Callable[[], Iterator[Row]]  # called again for every pass
Reader = Callable[[str, Slice, Options], Stream]


class Source:
    """Records of one location, read again (and lazily) on every pass.

    ``rows`` and ``bad`` describe the latest pass; reading them before any pass makes one. Nothing is dropped silently:
    a bad row either raises an error or is listed in ``bad``.

    Attributes:
      columns_field: the config field that renames columns, for error messages.
      evaluated: whether a model is evaluated on these records, so that the bytes of their text are counted.
    """

    columns_field = "config.data.columns"
    evaluated = False

    def __init__(self, format: str, location: str, stream: Stream, rename: Mapping[str, str] | None, bad_rows: str):
        self.format, self.location = format, location
        self._stream, self._rename, self._stop = stream, dict(rename) if rename else None, bad_rows == "stop"
        self._rows: int | None = None
        self._bad: list[BadRow] = []

    def __iter__(self) -> Iterator[Record]:
        return (row.record for row in self.located() if row.record is not None)

    def located(self) -> Iterator[Row]:
        """Good rows with their file and line, for a reader that may ``reject`` some of them."""
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
            rows += len(self._bad) == bad  # unless the reader rejected it
        self._rows = rows

    def usable(self, read: Callable[[Record], T], optional: Collection[str] = ()) -> Iterator[T]:
        """`read(record)` of every row; a row for which it raises Unusable is a bad row.

        Args:
          optional: columns that either all rows have or none.

        Raises:
          ValueError: if no row is usable, with the reason of the first.
        """
        expected: frozenset[str] | None = None
        for row in self.located():
            assert row.record is not None
            try:
                value = read(row.record)
                columns = frozenset(row.record.keys() & set(optional))
                if expected is not None and columns != expected:
                    name = min(columns ^ expected)
                    raise Unusable(
                        f"no column {name!r}, which the rows before have"
                        if name in expected
                        else f"a column {name!r}, which the rows before do not have"
                    )
            except Unusable as error:
                self.reject(row, str(error))
                continue
            expected = columns
            yield value
        if expected is None:
            raise self.nothing_usable()

    def nothing_usable(self) -> ValueError:
        """The error of a pass without good rows."""
        bad = f": all {len(self._bad)} are bad, the first at {self._bad[0]}" if self._bad else ""
        return ValueError(f"{self.location!r} ({self.format}) holds no usable row{bad}")

    def reject(self, row: Row, reason: str) -> None:
        """Marks a row as bad: raises BadRowError with "stop", else lists it. For rows that only a task can check."""
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
        """Bad rows of the latest pass (empty with "stop", which raises instead)."""
        if self._rows is None:
            self.rows  # noqa: B018  (makes the pass that counts)
        return self._bad

    def __repr__(self) -> str:
        return f"Source(format={self.format!r}, location={self.location!r})"


def sliced(stream: Stream, part: Slice) -> Stream:
    """A slice of a stream; a percentage costs one more pass, to count the rows."""
    if part.whole:
        return stream

    count = functools.cache(lambda: sum(1 for _ in stream()))

    def rows() -> Iterator[Row]:
        if part.needs_count:
            return itertools.islice(stream(), *part.bounds(count()))
        return itertools.islice(stream(), int(part.start or 0), None if part.stop is None else int(part.stop))

    return rows


def open_bytes(file: str) -> IO[bytes]:
    """The bytes of a file, decompressed if it ends with ``.gz``."""
    return cast(IO[bytes], gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb"))


def lines(file: str) -> Iterator[str]:
    """Lines of a UTF-8 file without their line ends; a byte-order mark is dropped.

    Only ``\\n`` and ``\\r\\n`` end a line: form feeds and Unicode separators are part of the text.
    """
    return (line.rstrip("\n").removesuffix("\r") for line in whole_lines(file))


def whole_lines(file: str) -> Iterator[str]:
    """Lines of a UTF-8 file with their line ends; a byte-order mark is dropped."""
    with open_bytes(file) as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(file, number, error) from None


def not_utf8(file: str, line: int, error: UnicodeDecodeError) -> ValueError:
    """The error of a file that is not UTF-8, with the commands that convert it."""
    byte = error.object[error.start]
    return ValueError(
        f"{file}:{line}: byte 0x{byte:02x} is not UTF-8; convert the file first, for example "
        f"`iconv -f latin1 -t utf-8` or `iconv -f gb18030 -t utf-8`"
    )
