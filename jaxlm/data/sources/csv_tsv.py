"""Comma- and tab-separated values, with a header line or with column names from the config.

csv follows RFC 4180: fields may be quoted, and a quoted field may contain commas and line breaks. tsv has no quoting: a
quotation mark is text (as in GLUE, STS-B and most data sets of sentences), and a line break always ends the row.
Values are strings.
"""

import csv
from collections.abc import Iterator

from jaxlm.data.sources.locations import Slice, find_files
from jaxlm.data.sources.source import Options, Row, Stream, lines, sliced, whole_lines

REST = "..."  # as the last column name: ignore further fields of a row


def csv_rows(location: str, part: Slice, options: Options) -> Stream:
    """One record per row, keyed by column name."""
    return _rows(location, part, options, _csv_fields)


def tsv_rows(location: str, part: Slice, options: Options) -> Stream:
    """One record per line, keyed by column name."""
    return _rows(location, part, options, _tsv_fields)


def _csv_fields(file: str) -> Iterator[tuple[int, list[str] | str]]:
    csv.field_size_limit(2**31 - 1)  # by default documents of more than 128 KiB are an error
    reader = csv.reader(whole_lines(file), strict=True)  # lines with their ends, which a quoted field may contain
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not CSV: {error}"
            continue
        if fields:
            yield number, fields


def _tsv_fields(file: str) -> Iterator[tuple[int, list[str] | str]]:
    for number, line in enumerate(lines(file), start=1):
        if line:
            yield number, line.split("\t")


def _rows(location: str, part: Slice, options: Options, fields_of) -> Stream:
    files = find_files(location)

    def stream() -> Iterator[Row]:
        for file in files:
            names = options.names
            for number, fields in fields_of(file):
                if isinstance(fields, str):
                    yield Row(file, number, None, fields)
                elif names is None:
                    names = tuple(fields)
                    if len(set(names)) < len(names):
                        raise ValueError(
                            f"{file}:{number}: the header {fields} repeats a name; if the file has no header, "
                            f"give its column names as a sequence, columns=('text', 'label')"
                        )
                else:
                    yield _row(file, number, fields, names)

    return sliced(stream, part)


def _row(file: str, number: int, fields: list[str], names: tuple[str, ...]) -> Row:
    open_ended = names[-1] == REST
    names = names[:-1] if open_ended else names
    if len(fields) < len(names) or (len(fields) > len(names) and not open_ended):
        return Row(file, number, None, f"{len(fields)} fields, expected {len(names)} ({', '.join(names)})")
    return Row(file, number, dict(zip(names, fields, strict=False)))
