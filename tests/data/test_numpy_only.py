"""The data package needs numpy only; heavier libraries are imported by the functions that use them, jax by none."""

import ast
import sys
from pathlib import Path

import pytest

import jaxlm.data

FILES = sorted(Path(jaxlm.data.__file__).parent.rglob("*.py"))


def modules(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module or ""} if isinstance(node, ast.ImportFrom) else set()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_imports(file):
    tree = ast.parse(file.read_text("utf-8"))
    everywhere = {m.partition(".")[0] for node in ast.walk(tree) for m in modules(node)}
    assert "jax" not in everywhere
    at_the_top = {m for node in tree.body for m in modules(node)}
    heavy = {m for m in at_the_top if m.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "jaxlm"}}
    assert not heavy
    assert all(m.startswith(("jaxlm.data", "jaxlm.core")) for m in at_the_top if m.startswith("jaxlm"))
