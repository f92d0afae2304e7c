"""Plain text: a document is a file, a line or a paragraph."""

from collections.abc import Iterator
from itertools import chain

from jaxlm.data.sources.locations import Slice, find_files, nearest
from jaxlm.data.sources.source import Options, Row, Stream, lines, not_utf8, open_bytes, sliced, whole_lines

DOCUMENTS = ("file", "line", "paragraph")


def rows(location: str, part: Slice, options: Options) -> Stream:
    """One record ``{"text"}`` per document.

    "file": the whole text, unchanged; a slice counts the characters of all files together, so that ``input.txt[:90%]``
    and ``input.txt[90%:]`` are the usual split of one long text.
    "line": every line that is not blank. "paragraph": the lines between blank lines. Both are sliced by document.
    """
    if options.documents not in DOCUMENTS:
        raise ValueError(f"unknown documents={options.documents!r}; {nearest(options.documents, DOCUMENTS)}")
    files = find_files(location)
    if options.documents == "file":
        return lambda: _file_slices(files, part)
    split = _lines if options.documents == "line" else _paragraphs
    return sliced(lambda: (row for file in files for row in split(file)), part)


def _whole(file: str) -> str:
    with open_bytes(file) as handle:
        content = handle.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(file, content.count(b"\n", 0, error.start) + 1, error) from None


def _file_slices(files: list[str], part: Slice) -> Iterator[Row]:
    """The characters of each file that lie in a slice of all files."""
    sizes = [0] * len(files) if part.whole else [len(_whole(file)) for file in files]
    start, stop = part.bounds(sum(sizes))
    offset = 0
    for file, size in zip(files, sizes, strict=True):
        if part.whole or (offset < stop and offset + size > start):
            text = _whole(file)
            first = max(start - offset, 0)
            document = text if part.whole else text[first : stop - offset]
            if document:
                yield Row(file, text.count("\n", 0, first) + 1, {"text": document})
        offset += size


def _lines(file: str) -> Iterator[Row]:
    for number, line in enumerate(lines(file), start=1):
        if line.strip():
            yield Row(file, number, {"text": line})


def _paragraphs(file: str) -> Iterator[Row]:
    start, paragraph = 1, ""
    for number, line in enumerate(chain(whole_lines(file), [""]), start=1):
        if line.strip(" \t\r\n"):  # a form feed is text
            paragraph += line
            continue
        text = paragraph.lstrip()
        if text:
            blank_lines = paragraph.count("\n", 0, len(paragraph) - len(text))
            yield Row(file, start + blank_lines, {"text": text.rstrip()})
        start, paragraph = number + 1, ""
