"""The standard library of the running Python: a corpus that is on every machine, a few million tokens of code."""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator

from jaxlm.data.sources.locations import Slice
from jaxlm.data.sources.source import Options, Row, Stream, sliced

# Tests repeat themselves, and the rest is not the library's own text.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def rows(place: str, part: Slice, options: Options) -> Stream:
    """One record ``{"text", "name"}`` a module, ordered by a hash of its name.

    The order has nothing to do with the alphabet or the machine, so ``stdlib[:90%]`` and ``stdlib[90%:]`` are a random
    but repeatable split by module.
    """
    if place != "stdlib":
        raise ValueError(f"the python format has one place, 'stdlib' (with a slice: 'stdlib[:90%]'), not {place!r}")
    modules = _in_order()
    return sliced(lambda: (_row(name, file) for name, file in modules), part)


def files(place: str) -> list[str]:
    """The files that are read."""
    return [file for _, file in _in_order()]


def _in_order() -> list[tuple[str, str]]:
    root = sysconfig.get_path("stdlib")
    modules = sorted(_modules(root), key=lambda module: hashlib.sha256(module[0].encode()).digest())
    if not modules:
        raise FileNotFoundError(f"the standard library holds no source files at {root!r}")
    return modules


def _modules(root: str) -> Iterator[tuple[str, str]]:
    """Dotted names and files; generated files such as ``_sysconfigdata_..-linux-gnu`` are no importable names."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f.isidentifier() and f not in _SKIPPED]
        for file in files:
            stem, extension = os.path.splitext(file)
            path = os.path.join(folder, file)
            if extension == ".py" and stem.isidentifier() and os.path.getsize(path):
                name = os.path.relpath(path, root).removesuffix(".py").replace(os.sep, ".")
                yield name.removesuffix(".__init__"), path


def _row(name: str, file: str) -> Row:
    try:
        with tokenize.open(file) as handle:  # honours a coding line
            return Row(file, 1, {"text": handle.read(), "name": name})
    except (SyntaxError, UnicodeDecodeError) as error:
        return Row(file, 1, None, f"not readable as Python source: {error}")
