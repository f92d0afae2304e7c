"""Sources of records, one module per format, chosen by name.

To add a format, write a Reader (``location, slice, options -> stream of rows``) and add a line to ``READERS``.
"""

from collections.abc import Mapping, Sequence

from jaxlm.data.sources import conll, csv_tsv, jsonl, python_library, text, tfds
from jaxlm.data.sources.locations import nearest, split_location
from jaxlm.data.sources.source import BadRow, BadRowError, Options, Reader, Record, Row, Source, Unusable

READERS: dict[str, Reader] = {
    "conll": conll.rows,
    "csv": csv_tsv.csv_rows,
    "jsonl": jsonl.rows,
    "python": python_library.rows,
    "text": text.rows,
    "tfds": tfds.rows,
    "tsv": csv_tsv.tsv_rows,
}


def read(
    format: str,
    location: str,
    *,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    bad_rows: str = "stop",
    documents: str = "file",
) -> Source:
    """The records of a file, several files, or a split of a data set.

    Args:
      format: a name in ``READERS``.
      location: path, glob or split, with an optional slice suffix (``train.csv[:90%]``).
      columns: a mapping selects and renames columns, ``{name here: name in the file}``; a sequence names the columns of
        a conll file, or of a csv or tsv file without header; a last ``"..."`` allows further fields in a row.
      bad_rows: "stop" raises BadRowError at the first bad row, "skip" lists them in ``Source.bad``.
      documents: for the text format, what one document is: "file", "line" or "paragraph".

    Raises:
      ValueError: unknown format, option or column, text that is not UTF-8, a location without rows.
      FileNotFoundError: the path does not exist, or no file matches the glob.
      BadRowError: see ``bad_rows``; here if the first row is bad, else while iterating.
    """
    if format not in READERS:
        raise ValueError(f"unknown data format {format!r}; {nearest(format, READERS)}")
    if bad_rows not in ("stop", "skip"):
        raise ValueError(f"unknown bad_rows={bad_rows!r}; {nearest(bad_rows, ('stop', 'skip'))}")
    if documents != "file" and format != "text":
        raise ValueError(f"documents={documents!r} is an option of the text format; {format} has one record per row")
    if isinstance(columns, str):
        raise ValueError(f"columns={columns!r} must be a mapping or a sequence of names")
    names = tuple(columns) if isinstance(columns, Sequence) else None
    rename = None if columns is None or isinstance(columns, Sequence) else dict(columns)
    if names is not None and format not in ("conll", "csv", "tsv"):
        raise ValueError(f"a sequence of columns names those of a conll, csv or tsv file; for {format} give a mapping")
    path, part = split_location(location)
    stream = READERS[format](path, part, Options(names, documents))
    source = Source(format, location, stream, rename, bad_rows)
    if next(iter(source), None) is None:
        raise source.nothing_usable()
    return source


__all__ = ["READERS", "BadRow", "BadRowError", "Record", "Row", "Source", "Unusable", "read"]
