"""The site is complete: a page a method, every field of the config, examples that build, code that is the files'."""

import doctest
import importlib
import json
import re

import jax
import pytest

from docs.site import pages
from docs.site.docstrings import describe
from jaxlm.core import NoData
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.runner import registry
from jaxlm.runner.config import default_config
from jaxlm.runner.distillation import distillation
from tests.contracts.small_models import OnlyTeacher

ENTRIES = pages.entries()
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.page)


# Methods --------------------------------------------------------------------------------------------------------------


@every_entry
def test_a_docstring_says_what_when_and_from_where(entry):
    description = describe(entry.function)
    assert description.what, "its docstring begins with what it does"
    assert description.when, "its docstring needs a paragraph `When: …`: one sentence that says when to use it"
    assert description.source, "its docstring needs a `Source: …`"
    assert "arXiv" not in description.source or "](https://arxiv.org/abs/" in pages.papers(description.source)
    explained = description.options.keys() | {field.name for field in pages.fields(pages.DistillConfig)}
    assert entry.options.keys() <= explained, "its docstring leaves options out (Args:)"


@pytest.fixture(scope="module")
def lm():
    return LM.initialize(
        model_config("gpt2", vocab_size=9, hidden_size=16, num_layers=4, num_heads=4, max_positions=8),
        jax.random.key(0),
    )


@every_entry
def test_the_example_of_a_page_builds(entry, lm):
    example = eval_recipe(entry.config)
    assert example == entry.example
    if entry.section == "methods":
        registry.make(registry.METHODS, example, "methods")
    elif entry.section == "losses":
        distillation(example, OnlyTeacher(lm))
    else:
        if entry.name == "unshare":
            lm = registry.operate({"name": "share", "layer_map": (0, 0, 1, 1)}, lm)
        try:
            registry.operate(example, lm)
        except NoData:  # its options are right: what it lacks is data
            return


def eval_recipe(text):
    """The one entry that the line of a recipe sets."""
    config = default_config()
    exec(text, {"config": config})
    (entry,) = next(config[section] for section in ("surgery", "methods", "losses") if config[section])
    return entry


@every_entry
def test_a_page_has_all_its_parts(entry):
    page = pages.method_page(entry)
    parts = dict(re.findall(r"^## (.+)\n\n(.+)$", page, flags=re.M))
    assert list(parts) == ["What it does", "When to use it", "Config", "Options and API", "Paper", "Measured"]


def test_measured_rows_are_those_of_the_stages_that_name_a_method():
    by_page = {entry.page: pages.measured(entry) for entry in ENTRIES}
    assert "| sparsegpt-2-4 | two of four weights, the others made up for it |" in by_page["surgery/sparsegpt.md"]
    assert (
        "| magnitude-80 |" in by_page["methods/magnitude.md"] and "| magnitude |" not in by_page["methods/magnitude.md"]
    )
    assert by_page["methods/ia3.md"] == "Not measured yet."
    header, rows = pages.reproduced("wnut")
    assert header == ["Size on disk", "Tokens/s in batches", "Entity F1"]
    assert rows["teacher"] == ["90.3 MB", "11.7 k (11.6 k–11.8 k)", "43.6 ± 3.5%"]


# Config ---------------------------------------------------------------------------------------------------------------


def test_every_field_of_the_config_is_explained():
    config = default_config()
    fields = {f"{section}.{field.name}": field for section, field in pages.config_fields()}
    assert not [name for name, field in fields.items() if not field.meaning or not field.type]
    sections = {name for name in config if hasattr(config[name], "items")} - {"sharding"}
    names = {f".{name}" for name in set(config) - sections - {"sharding"}}
    names |= {f"{section}.{name}" for section in sections for name in config[section]}
    assert fields.keys() == names
    page = pages.config_page()
    assert all(f"| `{field.name}` |" in page and field.meaning in page for field in fields.values())


# Guides ---------------------------------------------------------------------------------------------------------------

GUIDE = (pages.ROOT / "docs/add_a_method.md").read_text("utf-8")
DIFFS = re.findall(r"```diff\n\+\+\+ (\S+)\n(.*?)```", GUIDE, flags=re.S)


@pytest.mark.parametrize(("path", "diff"), DIFFS, ids=[path for path, _ in DIFFS])
def test_the_diffs_of_the_worked_example_are_in_the_files(path, diff):
    assert "".join(line[1:] for line in diff.splitlines(keepends=True)) in (pages.ROOT / path).read_text("utf-8")
    assert any(line.startswith("+") for line in diff.splitlines())


def test_the_worked_example_shows_every_file_that_names_it():
    shown = {path for path, _ in DIFFS} | set(re.findall(r'--8<-- "(.+?)"', GUIDE))
    files = [path for folder in ("jaxlm", "tests") for path in (pages.ROOT / folder).rglob("*.*")]
    code = [path for path in files if path.suffix in (".py", ".txt")]
    named = {str(path.relative_to(pages.ROOT)) for path in code if re.search("IA3|ia3", path.read_text("utf-8"))}
    assert named - {"tests/docs/test_site.py"} == shown


def test_parts_of_the_readme_are_included():
    page = pages.included((pages.ROOT / "docs/install.md").read_text("utf-8"))
    assert "make demo" in page and "jax[cuda13]" in page and "include:" not in page
    assert "## Change something" not in page and "## How it is built" not in page
    with pytest.raises(ValueError, match="no part is called 'Three commands'"):
        pages.included("<!-- include: README.md, Three commands -->")


def test_links_of_the_readme_lead_to_pages():
    text = "[a](docs/data.md) ![b](docs/b.png) [`jaxlm/x.py`](jaxlm/x.py) [c](CONTRIBUTING.md) [d](LICENSE)"
    assert pages.site_page(text) == "[a](data.md) ![b](b.png) `jaxlm/x.py` [c](contributing.md) d"


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    """Cell by cell, in order, as a notebook does."""
    monkeypatch.chdir(tmp_path)
    text = (pages.ROOT / "docs/quickstart.ipynb").read_text("utf-8")
    namespace: dict = {}
    for cell in pages.code_cells(json.loads(text)):
        exec(cell, namespace)
    teacher, pruned, int8 = namespace["models"]
    assert int8.bytes_on_disk < pruned.bytes_on_disk < teacher.bytes_on_disk
    assert (tmp_path / "runs/notebook/report.html").exists()
    page = pages.notebook_page(text)
    assert page.startswith("# Quickstart") and "```python\nfrom jaxlm" in page and "```text\nModel" in page


@pytest.mark.parametrize("name", ["docs.site.docstrings", "docs.site.pages"])
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed
