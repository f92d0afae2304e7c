"""JSON lines: one object per line."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from jaxlm.data.sources.locations import Slice, find_files
from jaxlm.data.sources.source import Options, Row, Stream, lines, sliced


def rows(location: str, part: Slice, options: Options) -> Stream:
    """The object of each line as a record, values with their JSON types. Blank lines are skipped."""
    files = find_files(location)
    return sliced(lambda: (row for file in files for row in _rows(file)), part)


def _rows(file: str) -> Iterator[Row]:
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
            has_surrogate = "\\u" in line and _has_lone_surrogate(value)
        except json.JSONDecodeError as error:
            hint = " (one JSON array over many lines? write one object a line)" if line.strip() in "[{" else ""
            yield Row(file, number, None, f"not JSON: {error.msg} at column {error.colno}{hint}")
            continue
        except RecursionError:
            yield Row(file, number, None, "JSON that is nested too deeply to be read")
            continue
        except ValueError:  # Python limits the digits of an integer
            yield Row(file, number, None, f"an integer of more than {sys.get_int_max_str_digits()} digits")
            continue
        if not isinstance(value, dict):
            yield Row(file, number, None, f"a JSON {type(value).__name__}, not an object")
        elif isinstance(value, _Ambiguous):
            yield Row(file, number, None, f"the object has the key {value.key!r} twice")
        elif has_surrogate:
            yield Row(file, number, None, "a lone surrogate (half of a \\ud83d\\ude00 pair), which is not text")
        else:
            yield Row(file, number, value)


class _Ambiguous(dict):
    """An object with a duplicate key; it is an error as a record, not inside one, where no value is read."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    ambiguous = _Ambiguous(value)
    ambiguous.key = next(name for name in names if names.count(name) > 1)
    return ambiguous


def _has_lone_surrogate(value: Any) -> bool:
    """Whether a text was cut inside a UTF-16 pair, which JSON allows and no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
