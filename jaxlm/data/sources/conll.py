"""CoNLL columns: one token a line, sentences separated by blank lines (CoNLL-2003, WNUT-17, ...)."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain

from jaxlm.data.sources.places import Slice, find_files
from jaxlm.data.sources.rows import Options, Row, Stream, lines, sliced

_COLUMNS = re.compile(r"[ \t]+")  # not str.split: a no-break space is part of a token


def rows(place: str, part: Slice, options: Options) -> Stream:
    """One record a sentence: ``{"tokens": first column, "tags": last column}``, tags as IOB2.

    A line of spaces or tabs separates as an empty one does; ``-DOCSTART-`` lines are skipped. A line without a tag
    makes its whole sentence one bad row, since a sentence with a missing token would be a wrong example.
    """
    files = find_files(place)
    return sliced(lambda: (row for file in files for row in _sentences(file)), part)


def _sentences(file: str) -> Iterator[Row]:
    tokens: list[str] = []
    tags: list[str] = []
    start, bad = 0, None
    for number, line in enumerate(chain(lines(file), [""]), start=1):
        columns = _COLUMNS.split(line.strip(" \t"))
        if not line.strip() or columns[0] == "-DOCSTART-":
            if bad:
                yield bad
            elif tokens:
                yield Row(file, start, {"tokens": tokens, "tags": to_iob2(tags)})
            tokens, tags, bad = [], [], None
            continue
        start = start if tokens else number
        if len(columns) < 2:
            bad = bad or Row(file, number, None, f"no tag behind the token {columns[0]!r}")
        tokens.append(columns[0])
        tags.append(columns[-1])


def to_iob2(tags: Sequence[str]) -> list[str]:
    """IOB1 to IOB2: every entity begins with ``B-``. IOB2 stays as it is, and so do tags without a prefix.

    >>> to_iob2(["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER"])
    ['B-PER', 'I-PER', 'B-PER', 'O', 'B-LOC', 'B-PER']
    """
    result = []
    previous = "O"
    for tag in tags:
        if tag.startswith("I-") and previous[2:] != tag[2:]:
            tag = "B-" + tag[2:]
        result.append(tag)
        previous = tag
    return result
