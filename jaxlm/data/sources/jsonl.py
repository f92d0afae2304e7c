"""JSON lines: one object a line."""

import json
from collections.abc import Iterator

from jaxlm.data.sources.places import Slice, find_files
from jaxlm.data.sources.rows import Options, Row, Stream, lines, sliced


def rows(place: str, part: Slice, options: Options) -> Stream:
    """Each line's object as a record, values with their JSON types. Blank lines are no rows."""
    files = find_files(place)
    return sliced(lambda: (row for file in files for row in _rows(file)), part)


def _rows(file: str) -> Iterator[Row]:
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            hint = " (one JSON array over many lines? write one object a line)" if line.strip() in "[{" else ""
            yield Row(file, number, None, f"not JSON: {error.msg} at column {error.colno}{hint}")
            continue
        if not isinstance(value, dict):
            yield Row(file, number, None, f"a JSON {type(value).__name__}, not an object")
        elif "\\u" in line and _is_half_a_character(value):
            yield Row(file, number, None, "a lone surrogate (half of a \\ud83d\\ude00 pair), which is no text")
        else:
            yield Row(file, number, value)


def _is_half_a_character(value: dict) -> bool:
    """JSON lets texts that were cut in UTF-16 pass, and no tokenizer does."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
