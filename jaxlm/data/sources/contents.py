"""Hashes of the files of a location, to detect data that changed under an unchanged name."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.sources import python_library, tfds
from jaxlm.data.sources.locations import find_files, split_location

FILES = {"python": python_library.files, "tfds": tfds.files}
"""The files behind a location, for formats whose locations are not paths."""


def contents(format: str, location: str, previous: Mapping[str, Any] = {}) -> dict[str, dict[str, Any]]:
    """`{file: {"bytes", "modified", "sha256"}}` of every file of a location, without regard to its slice.

    Args:
      previous: an earlier result; a file of the same size and modification time is not read again.
    """
    path, _ = split_location(location)
    return {file: _content(file, previous.get(file, {})) for file in FILES.get(format, find_files)(path)}


def _content(file: str, previous: Mapping[str, Any]) -> dict[str, Any]:
    stat = os.stat(file)
    current = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
    if current.items() <= previous.items():
        return dict(previous)
    return current | {"sha256": _sha256(file, **current)}


@functools.cache
def _sha256(file: str, bytes: int, modified: int) -> str:
    """The hash of a file of this size and modification time; cached, since pipeline stages share their files."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The files whose hashes differ, or that are in only one of two results of `contents`.

    >>> changes({"a": {"sha256": "0", "modified": 1}}, {"a": {"sha256": "0", "modified": 2}, "b": {"sha256": "1"}})
    ['b']
    """
    differ = {file for file in before.keys() & after.keys() if before[file]["sha256"] != after[file]["sha256"]}
    return sorted(differ | (before.keys() ^ after.keys()))
