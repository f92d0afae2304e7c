"""Imports point one way, and neither deprecated nor dangerous calls enter the code."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# package -> the packages of jaxlm that it may import besides itself
MAY_IMPORT = {
    "core": set(),
    "parallel": {"core"},
    "nn": {"core", "parallel"},
    "models": {"core", "parallel", "nn"},
    "generate": {"core", "parallel", "nn", "models"},
    "io": {"core", "parallel", "nn", "models", "generate"},
    "losses": {"core"},
    "methods": {"core", "losses", "data"},
    "data": {"core"},
    "tasks": {"core", "data", "losses"},
    "train": {"core", "parallel"},
    "evaluate": {"core", "parallel", "models", "generate", "io", "data", "tasks"},
    "report": {"core", "evaluate", "tasks"},
}
TOP = {"runner", "commands", "__init__", "__main__"}
"""They join everything and are imported by nothing below."""
FORBIDDEN_IMPORTS = ("jax.experimental.pjit", "pickle", "cPickle", "cloudpickle", "dill")
SOURCES = [
    path.relative_to(ROOT)
    for part in ("jaxlm", "experiments", "configs", "bench", "docs")
    for path in (ROOT / part).rglob("*.py")
]


PEERS = "methods"  # its folders never import each other; what several of them need lies beside them


def imported_modules(path: Path, tree: ast.AST):
    """(line, dotted module) of everything the file imports, relative imports resolved, `from a import b` as a.b."""
    package = path.with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(path: Path, source: str) -> list[str]:
    """What the file at `path` (relative to the repository) may not do, one line each."""
    tree = ast.parse(source)
    found = []
    inside = path.parts[0] == "jaxlm"
    owner = path.with_suffix("").parts[1] if inside else ""
    if inside and owner not in MAY_IMPORT.keys() | TOP:
        found.append(f"{path}: jaxlm.{owner} has no row in MAY_IMPORT")
    for line, module in imported_modules(path, tree):
        if any(module == name or module.startswith(name + ".") for name in FORBIDDEN_IMPORTS):
            found.append(f"{path}:{line}: imports {module}")
        parts = module.split(".")
        if inside and parts[0] in ("experiments", "configs", "bench", "tests"):
            found.append(f"{path}:{line}: jaxlm imports {module}")
        if inside and owner not in TOP and parts[0] == "jaxlm":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target != owner and target not in MAY_IMPORT.get(owner, ()):
                found.append(f"{path}:{line}: {owner} imports {module}, which is not below it")
            if owner == target == PEERS and len(path.parts) > 3 and parts[2] != path.parts[2] and len(parts) > 4:
                found.append(f"{path}:{line}: imports {module}, of a peer")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "eval":
            found.append(f"{path}:{node.lineno}: calls eval")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.experimental.pjit":
            found.append(f"{path}:{node.lineno}: uses jax.experimental.pjit")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_source(path):
    assert not violations(path, (ROOT / path).read_text("utf-8"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jaxlm/core/tree.py", "from jaxlm.nn import dense"),
        ("jaxlm/core/tree.py", "def f():\n    import jaxlm.models.gpt2"),
        ("jaxlm/core/tree.py", "from ..nn.dense import dense"),
        ("jaxlm/core/tree.py", "from .. import models"),
        ("jaxlm/core/tree.py", "import jaxlm"),
        ("jaxlm/core/tree.py", "from jaxlm import load"),
        ("jaxlm/train/loop.py", "from jaxlm.tasks import causal"),
        ("jaxlm/train/loop.py", "from jaxlm.runner import stage"),
        ("jaxlm/runner/stage.py", "from experiments import train"),
        ("jaxlm/methods/share/clustering.py", "from jaxlm.methods.prune.schedule import cubic"),
        ("jaxlm/surprise/x.py", ""),
        ("experiments/train.py", "import pickle"),
        ("experiments/train.py", "from jax.experimental import pjit"),
        ("experiments/train.py", "jax.experimental.pjit.pjit(f)"),
        ("configs/quickstart.py", "eval('1')"),
    ],
)
def test_upward_and_dangerous_are_found(path, source):
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "jaxlm/nn/dense.py",
            "import jax.experimental.pallas\nfrom jaxlm.core import weight\nfrom . import norm",
        ),
        ("jaxlm/methods/share/clustering.py", "from jaxlm.methods.calibration import KERNELS"),
        ("jaxlm/methods/prune/structured/l0.py", "from jaxlm.methods.prune.schedule import cubic"),
        ("jaxlm/tasks/causal.py", "from jaxlm.losses.cross_entropy import cross_entropy"),
        ("jaxlm/runner/stage.py", "from jaxlm.models import gpt2\nfrom jaxlm.train import loop"),
        ("experiments/train.py", "import jaxlm\nmodel.eval(batch)\njax.eval_shape(f)"),
    ],
)
def test_downward_is_allowed(path, source):
    assert not violations(Path(path), source)


def test_no_circle():
    """Neither among files, imports inside functions included, nor among folders."""
    files = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    files = {name: path for name, path in files.items() if name.startswith("jaxlm")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        named = {module for _, module in imported_modules(path, ast.parse((ROOT / path).read_text("utf-8")))}
        graph[name] = {module if module in files else module.rpartition(".")[0] for module in named} & files.keys()
    folder = lambda name: name.split(".")[1] if "." in name else name  # noqa: E731
    folders = {
        folder(name): {folder(m) for n in graph for m in graph[n] if folder(n) == folder(name)} for name in graph
    }
    for found in (graph, folders):
        list(graphlib.TopologicalSorter({name: set(below) - {name} for name, below in found.items()}).static_order())
