"""What pyproject.toml promises: ranges that the lock lies in, extras that errors name, every recipe in its place."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
ALL = EXTRAS.pop("all")


def locked(file: str) -> dict[str, Requirement]:
    """The requirements of a lock file by name."""
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def ranges() -> dict[str, Requirement]:
    """The project's requirements by name, extras included."""
    every = [
        *map(Requirement, PROJECT["dependencies"]),
        *(requirement for extra in EXTRAS.values() for requirement in extra),
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in every}


def version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not exact"
    return specifier.version


def test_the_lock_names_what_the_project_requires():
    assert locked("requirements.txt").keys() == ranges().keys()


@pytest.mark.parametrize("name", ranges())
def test_the_lock_lies_in_the_range(name):
    pinned, allowed = locked("requirements.txt")[name], ranges()[name]
    assert allowed.specifier.contains(version(pinned))
    assert str(pinned.marker) == str(allowed.marker)


def test_all_is_every_extra():
    (everything,) = ALL
    assert everything.name == PROJECT["name"] and everything.extras == EXTRAS.keys()


def test_errors_name_extras_that_bring_the_module():
    asked = {}
    for path in (ROOT / "jaxlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                module, extra = (ast.literal_eval(argument) for argument in node.args)
                asked[extra] = canonicalize_name(module)
    assert asked.keys() == EXTRAS.keys()
    for extra, module in asked.items():
        assert module in {canonicalize_name(requirement.name) for requirement in EXTRAS[extra]}


def test_a_missing_extra_is_named(monkeypatch):
    from jaxlm.core import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"optuna is not installed; pip install 'jaxlm\[search\]'"):
        extras.require("optuna", "search")


def test_every_recipe_is_installed():
    folders = PYPROJECT["tool"]["setuptools"]["data-files"]
    installed = {path for patterns in folders.values() for pattern in patterns for path in ROOT.glob(pattern)}
    assert installed == set((ROOT / "configs").rglob("*.py"))
    for folder, patterns in folders.items():
        assert patterns == [f"{folder.removeprefix('share/jaxlm/')}/*.py"]


def test_the_same_versions_of_python_everywhere():
    minors = sorted(int(minor) for line in PROJECT["classifiers"] for minor in re.findall(r":: 3\.(\d+)$", line))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{minors[0]}"
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in minors]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text("utf-8")
