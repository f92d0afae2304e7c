"""Plain text: a document is a file, a line or a paragraph."""

from collections.abc import Iterator
from itertools import chain

from jaxlm.data.sources.locations import Slice, find_files, nearest
from jaxlm.data.sources.source import Options, Row, Stream, lines, not_utf8, open_bytes, sliced, whole_lines

DOCUMENTS = ("file", "line", "paragraph")


def rows(place: str, part: Slice, options: Options) -> Stream:
    """One record ``{"text"}`` a document.

    "file": the whole text, byte for byte; a slice cuts the characters of all files together, so that
    ``input.txt[:90%]`` and ``input.txt[90%:]`` are the customary two parts of one long text.
    "line": every line that is not blank. "paragraph": stretches between blank lines. Both are sliced by document.
    """
    if options.documents not in DOCUMENTS:
        raise ValueError(f"unknown documents={options.documents!r}; {nearest(options.documents, DOCUMENTS)}")
    files = find_files(place)
    if options.documents == "file":
        return lambda: _cut(files, part)
    split = _lines if options.documents == "line" else _paragraphs
    return sliced(lambda: (row for file in files for row in split(file)), part)


def _whole(file: str) -> str:
    with open_bytes(file) as handle:
        content = handle.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(file, content.count(b"\n", 0, error.start) + 1, error) from None


def _cut(files: list[str], part: Slice) -> Iterator[Row]:
    sizes = [0] * len(files) if part.whole else [len(_whole(file)) for file in files]
    start, stop = part.bounds(sum(sizes))
    before = 0
    for file, size in zip(files, sizes, strict=True):
        if part.whole or (before < stop and before + size > start):
            text = _whole(file)
            first = max(start - before, 0)
            taken = text if part.whole else text[first : stop - before]
            if taken:
                yield Row(file, text.count("\n", 0, first) + 1, {"text": taken})
        before += size


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
            skipped = paragraph.count("\n", 0, len(paragraph) - len(text))
            yield Row(file, start + skipped, {"text": text.rstrip()})
        start, paragraph = number + 1, ""
