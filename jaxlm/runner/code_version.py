"""Which code a stage was made with: a hash that changes when what it computes may, and not when a sentence does."""

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PLACE = r"[a-zA-Z_]\w*(\.\w+)*:\w+"
"""Something in a module."""


@functools.cache
def code_version(module: str = "jaxlm.runner.stage", package: Path = PACKAGE) -> str:
    """sha256 over the syntax trees of a module and of all that it imports from its package, directly or not.

    Comments, docstrings and layout are no part of a syntax tree, so a renamed docstring leaves the hash as it is; so
    does code that the module does not reach.

    Args:
      module: dotted name, the package's own name first; package: its folder.
    """
    total = hashlib.sha256()
    for name, tree in sorted(reachable(module, package).items()):
        total.update(f"{name}\0{ast.dump(without_strings(tree))}\0".encode())
    return total.hexdigest()


def reachable(module: str, package: Path) -> dict[str, ast.Module]:
    """The syntax trees of a module and of what it imports from its package, by dotted name; also where functions do."""
    trees: dict[str, ast.Module] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = source_of(name, package)
        if name in trees or path is None:
            continue
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
        waiting += imported_by(trees[name], name)
        waiting += [name.rpartition(".")[0]] if "." in name else []  # a package runs its __init__ first
    return trees


def source_of(name: str, package: Path) -> Path | None:
    """The file of a module, `None` for what is no module of the package (a name inside one, say)."""
    first, *rest = name.split(".")
    path = package.joinpath(*rest)
    candidates = (path.with_suffix(".py"), path / "__init__.py") if rest else (package / "__init__.py",)
    return next((path for path in candidates if first == package.name and path.is_file()), None)


def imported_by(tree: ast.Module, module: str) -> Iterator[str]:
    """Dotted names that a module imports, now or on demand; `from a import b` gives `a` and `a.b`.

    On demand it imports what its strings name: `"a.b:function"`, and `"b:function"` in a table of the package `a` (see
    `core.catalog`).
    """
    for node in running(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(PLACE, node.value):
            name = node.value.partition(":")[0]
            yield from (name, f"{module}.{name}")


def running(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, but for what only type checkers read.

    >>> [n.names[0].name for n in running(ast.parse("import a\\nif TYPE_CHECKING: import b")) if hasattr(n, "names")]
    ['a']
    """
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from running(child)


def without_strings(tree: ast.Module) -> ast.Module:
    """The tree without statements that are a string alone: docstrings of modules, functions, classes and constants.

    >>> ast.unparse(without_strings(ast.parse('X = 1\\n"the first"\\ndef f():\\n    "says"\\n    return "x"')))
    "X = 1\\n\\ndef f():\\n    return 'x'"
    """
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_string(statement)]  # type: ignore[attr-defined]
    return tree


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
