"""JSON lines: one object a line."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from jaxlm.data.sources.locations import Slice, find_files
from jaxlm.data.sources.source import Options, Row, Stream, lines, sliced


def rows(place: str, part: Slice, options: Options) -> Stream:
    """Each line's object as a record, values with their JSON types. Blank lines are no rows."""
    files = find_files(place)
    return sliced(lambda: (row for file in files for row in _rows(file)), part)


def _rows(file: str) -> Iterator[Row]:
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
            half = "\\u" in line and _is_half_a_character(value)
        except json.JSONDecodeError as error:
            hint = " (one JSON array over many lines? write one object a line)" if line.strip() in "[{" else ""
            yield Row(file, number, None, f"not JSON: {error.msg} at column {error.colno}{hint}")
            continue
        except RecursionError:
            yield Row(file, number, None, "JSON that is nested too deeply to be read")
            continue
        except ValueError:  # Python reads integers of at most so many digits
            yield Row(file, number, None, f"an integer of more than {sys.get_int_max_str_digits()} digits")
            continue
        if not isinstance(value, dict):
            yield Row(file, number, None, f"a JSON {type(value).__name__}, not an object")
        elif isinstance(value, _Ambiguous):
            yield Row(file, number, None, f"the key {value.key!r} stands twice in the object")
        elif half:
            yield Row(file, number, None, "a lone surrogate (half of a \\ud83d\\ude00 pair), which is no text")
        else:
            yield Row(file, number, value)


class _Ambiguous(dict):
    """An object in which a key stands twice; inside others it does no harm, as nobody reads it."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    ambiguous = _Ambiguous(value)
    ambiguous.key = next(name for name in names if names.count(name) > 1)
    return ambiguous


def _is_half_a_character(value: Any) -> bool:
    """JSON lets texts that were cut in UTF-16 pass, and no tokenizer does."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
