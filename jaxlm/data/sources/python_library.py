"""The standard library of the running Python: a corpus on every machine, a few million tokens of code."""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator

from jaxlm.data.sources.locations import Slice
from jaxlm.data.sources.source import Options, Row, Stream, sliced

# Tests are repetitive, and the others are not part of the library.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def rows(location: str, part: Slice, options: Options) -> Stream:
    """One record ``{"text", "name"}`` per module, ordered by a hash of its name.

    The order does not depend on the alphabet or the machine, so ``stdlib[:90%]`` and ``stdlib[90%:]`` are a random but
    repeatable split by module.
    """
    if location != "stdlib":
        raise ValueError(f"the python format reads 'stdlib' only (with a slice: 'stdlib[:90%]'), not {location!r}")
    modules = _hashed_order()
    return sliced(lambda: (_row(name, file) for name, file in modules), part)


def files(location: str) -> list[str]:
    """The files that are read."""
    return [file for _, file in _hashed_order()]


def _hashed_order() -> list[tuple[str, str]]:
    """Names and files of all modules, ordered by the hash of the name."""
    root = sysconfig.get_path("stdlib")
    modules = sorted(_modules(root), key=lambda module: hashlib.sha256(module[0].encode()).digest())
    if not modules:
        raise FileNotFoundError(f"the standard library holds no source files at {root!r}")
    return modules


def _modules(root: str) -> Iterator[tuple[str, str]]:
    """Dotted names and files of importable modules (``_sysconfigdata_..-linux-gnu``, for one, is not)."""
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
        with tokenize.open(file) as handle:  # decodes as the coding line says
            return Row(file, 1, {"text": handle.read(), "name": name})
    except (SyntaxError, UnicodeDecodeError) as error:
        return Row(file, 1, None, f"not readable as Python source: {error}")
