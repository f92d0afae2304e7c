"""What lies at a place, as hashes of its files: data that changed under a name that did not are told so."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.sources import python_library, tfds
from jaxlm.data.sources.locations import find_files, split_place

FILES = {"python": python_library.files, "tfds": tfds.files}
"""Formats whose places are no files, with what they read."""


def contents(format: str, place: str, known: Mapping[str, Any] = {}) -> dict[str, dict[str, Any]]:
    """`{file: {"bytes", "modified", "sha256"}}` of every file that a place names, a slice of it left aside.

    Args:
      known: an earlier answer; a file of the same size that was not written to since is not read again.
    """
    bare, _ = split_place(place)
    return {file: _content(file, known.get(file, {})) for file in FILES.get(format, find_files)(bare)}


def _content(file: str, known: Mapping[str, Any]) -> dict[str, Any]:
    facts = os.stat(file)
    now = {"bytes": facts.st_size, "modified": facts.st_mtime_ns}
    if now.items() <= known.items():
        return dict(known)
    return now | {"sha256": _sha256(file, **now)}


@functools.cache
def _sha256(file: str, bytes: int, modified: int) -> str:
    """The hash of a file as it was written last; the stages of a pipeline ask for the same files."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The files whose bytes differ, or that only one side has.

    >>> changes({"a": {"sha256": "0", "modified": 1}}, {"a": {"sha256": "0", "modified": 2}, "b": {"sha256": "1"}})
    ['b']
    """
    differ = {file for file in before.keys() & now.keys() if before[file]["sha256"] != now[file]["sha256"]}
    return sorted(differ | (before.keys() ^ now.keys()))
