"""CoNLL columns: one token a line, sentences separated by blank lines (CoNLL-2003, WNUT-17, CoNLL-U, ...)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from jaxlm.data.sources.csv_tsv import REST
from jaxlm.data.sources.locations import Slice, find_files
from jaxlm.data.sources.source import Options, Row, Stream, lines, sliced

_BLANKS = re.compile(r"[ \t]+")  # not str.split, as a no-break space is part of a token
_TAB = re.compile(r" *\t *")
_NUMBER = re.compile(r"\d+([-.]\d+)?")  # CoNLL-U numbers a word of several tokens 1-2, and an elided word 1.1
_ENTRY = re.compile(r"#[ \t]*[\w.]+ = ")  # metadata of a sentence in CoNLL-U


def rows(location: str, part: Slice, options: Options) -> Stream:
    """One record a sentence: ``{"tokens": first column, "tags": last column}``, tags as IOB2.

    With ``options.names`` a record has the columns with these names. A line of spaces or tabs separates sentences as an
    empty one does, and so does ``-DOCSTART-``. A line that begins with ``#`` before a sentence is a comment, unless it
    looks like a token: as many columns as others, and a tag. A line without a tag, or with more or fewer columns than
    the first, makes its whole sentence one bad row, since a sentence with a missing token would be a wrong example.

    Raises:
      ValueError: names without ``tokens`` or ``tags``; a file without names whose first column numbers the tokens.
    """
    names = options.names
    if names is not None and not {"tokens", "tags"} <= set(names):
        raise ValueError(f"columns={names} must name 'tokens' and 'tags' among the columns of a line, for conll files")
    files = find_files(location)
    return sliced(lambda: (row for file in files for row in _sentences(file, names)), part)


@dataclass(frozen=True)
class _Layout:
    """Properties of the lines of a file that do not begin with ``#``.

    Attributes:
      widths: numbers of columns that occur.
      last: values of the last column that occur.
      numbered: every line has three columns or more, and the first is a number.
      iob: all tags are ``O``, ``B-…`` or ``I-…``.
    """

    widths: frozenset[int]
    last: frozenset[str]
    numbered: bool
    iob: bool

    def is_comment(self, line: str, columns: Sequence[str], inside: bool) -> bool:
        """Whether a line, the first of a sentence or inside one, is a comment."""
        if not line.startswith("#"):
            return False
        if self.numbered:
            return True
        tagged = columns[-1] in self.last or _is_iob(columns[-1])
        return not inside and (_ENTRY.match(line) is not None or len(columns) not in self.widths or not tagged)


def _layout(file: str, tag_column: int) -> _Layout:
    """The layout of a file whose tags are in the column ``tag_column``."""
    widths, last, tags, numbered = set(), set(), set(), True
    for _, line in _lines(file):
        columns = _split(line)
        if line and not line.startswith("#") and columns[0] != "-DOCSTART-":
            widths.add(len(columns))
            last.add(columns[-1])
            tags.add(columns[tag_column] if -len(columns) <= tag_column < len(columns) else "O")
            numbered = numbered and len(columns) > 2 and _NUMBER.fullmatch(columns[0]) is not None
    return _Layout(frozenset(widths), frozenset(last), numbered and bool(widths), all(map(_is_iob, tags)))


def _is_iob(tag: str) -> bool:
    return tag == "O" or tag[:2] in ("B-", "I-")


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """Numbers and lines, stripped of spaces and tabs."""
    return ((number, line.strip(" \t") if line.strip() else "") for number, line in enumerate(lines(file), start=1))


def _split(line: str) -> list[str]:
    """The columns of a line: between tabs if it has any, else between spaces."""
    return (_TAB if "\t" in line else _BLANKS).split(line)


def _sentences(file: str, names: tuple[str, ...] | None) -> Iterator[Row]:
    layout = _layout(file, -1 if names is None else names.index("tags"))
    sentence: list[list[str]] = []
    start, bad = 0, None
    for number, line in chain(_lines(file), [(0, "")]):
        columns = _split(line)
        if not line or columns[0] == "-DOCSTART-" or layout.is_comment(line, columns, inside=bool(sentence)):
            if bad:
                yield bad
            elif sentence:
                yield Row(file, start, _record(sentence, names, layout))
            sentence, bad = [], None
            continue
        if layout.numbered and names is None:
            raise ValueError(
                f"{file}:{number}: the first column numbers the tokens, so it is not clear which of the "
                f"{len(columns)} columns hold tokens and tags: name them in order, "
                'config.data.columns = ("number", "tokens", "tags", "...")'
            )
        if layout.numbered and not columns[0].isdigit():
            continue
        start = start if sentence else number
        sentence.append(columns)
        bad = bad or _bad(file, number, sentence, names)


def _bad(file: str, number: int, sentence: list[list[str]], names: tuple[str, ...] | None) -> Row | None:
    """A bad row if the last line of a sentence is malformed, else None."""
    columns, first = sentence[-1], sentence[0]
    if names is not None:
        expected = len(names) - (names[-1] == REST)
        if len(columns) < expected or (len(columns) > expected and names[-1] != REST):
            listed = ", ".join(names[:expected])
            return Row(file, number, None, f"{len(columns)} columns, expected {expected} ({listed})")
    elif len(columns) < 2:
        return Row(file, number, None, f"no tag after the token {columns[0]!r}")
    elif len(columns) != len(first):
        return Row(file, number, None, f"{len(columns)} columns, the sentence's first line has {len(first)}")
    return None


def _record(sentence: list[list[str]], names: tuple[str, ...] | None, layout: _Layout) -> dict[str, list[str]]:
    if names is None:
        record = {"tokens": [columns[0] for columns in sentence], "tags": [columns[-1] for columns in sentence]}
    else:
        record = {name: [c[i] for c in sentence] for i, name in enumerate(names) if name != REST}
    return record | ({"tags": to_iob2(record["tags"])} if layout.iob else {})


def to_iob2(tags: Sequence[str]) -> list[str]:
    """IOB1 to IOB2: every entity begins with ``B-``. IOB2 and tags without a prefix are unchanged.

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
