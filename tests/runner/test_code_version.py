"""What a finished stage is recognised by: code that could compute something else, and nothing else."""

from collections.abc import Mapping

import pytest

from jaxlm.runner.code_version import PACKAGE, code_version, reachable

FILES = {
    "__init__.py": "",
    "stage.py": """
from made.method import scale


def run(x):
    from made.inner import lazy

    return lazy.add(scale(x))
""",
    "method.py": """
'A method.'

FACTOR = 2
'Why two.'


def scale(x):
    'Twice.'
    return FACTOR * x  # of x
""",
    "inner/__init__.py": "'A package.'\nTABLE = {'add': 'deeper.named:add'}",
    "inner/deeper/__init__.py": "",
    "inner/deeper/named.py": "def add(x): return x + 1",
    "inner/lazy.py": "def add(x): return x + 1",
    "report.py": "from made import stage",
}


@pytest.fixture
def hash_of(tmp_path):
    """`hash_of({file: content, ...})`: the hash of made.stage with some files changed."""

    def change(changed: Mapping[str, str] = {}) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "made"
        for name, text in (FILES | dict(changed)).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return code_version("made.stage", folder)

    return change


def test_words_and_layout_are_not_code(hash_of):
    same = """
'Other words.'
FACTOR = 2
'Because.'
def scale(x):
    "2 x"

    return (FACTOR *
        x)
"""
    assert hash_of({"method.py": same}) == hash_of()
    assert hash_of({"report.py": "raise SystemExit"}) == hash_of(), "a stage does not import the report"


def test_what_only_type_checkers_import_is_not_code(hash_of):
    named = {"__init__.py": "if TYPE_CHECKING:\n    from made import report"}
    assert hash_of(named | {"report.py": "raise SystemExit"}) == hash_of(named)
    imported = {"__init__.py": "if TYPE_CHECKING:\n    pass\nelse:\n    from made import report"}
    assert hash_of(imported | {"report.py": "raise SystemExit"}) != hash_of(imported)


@pytest.mark.parametrize(
    "changed",
    [
        {"method.py": FILES["method.py"].replace("= 2", "= 3")},
        {"method.py": FILES["method.py"].replace("FACTOR * x", "x * FACTOR")},
        {"method.py": FILES["method.py"].replace("return", 'return "" or')},
        {"stage.py": FILES["stage.py"].replace("scale(x)", "x")},
        {"inner/lazy.py": "def add(x): return x + 2"},
        {"inner/__init__.py": "LEVEL = 1"},
        {"inner/deeper/named.py": "def add(x): return x + 2"},
    ],
    ids=str,
)
def test_what_may_compute_something_else_is(hash_of, changed):
    assert hash_of(changed) != hash_of()


def test_the_hash_of_jaxlm_sees_its_methods_and_not_its_report():
    modules = reachable("jaxlm.runner.stage", PACKAGE)
    assert {"jaxlm.runner.stage", "jaxlm.runner.registry", "jaxlm.train.step", "jaxlm.nn.attention"} <= modules.keys()
    assert not {"jaxlm.report.document", "jaxlm.runner.pipeline"} & modules.keys()
    imported = {
        ".".join(("jaxlm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for folder in ("core", "losses", "methods", "train")
        for path in (PACKAGE / folder).rglob("*.py")
    }
    assert imported <= modules.keys()
