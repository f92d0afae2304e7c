"""The pages that are generated: one a method, the config reference, and the README and the notebook as pages.

All are functions from what the code says of itself to Markdown.
"""

import dataclasses
import importlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from docs.site.docstrings import Description, describe, meanings, section
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.evaluate.settings import ReportSettings, SearchSettings
from jaxlm.methods.distill.teacher import DistillConfig
from jaxlm.models.config import KINDS, ModelConfig
from jaxlm.runner.config import MeshSettings, ModelSettings, RunSettings, default_config, plain
from jaxlm.runner.registry import LOSSES, METHODS, SURGERY
from jaxlm.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]

# Methods --------------------------------------------------------------------------------------------------------------

TABLES: Mapping[str, Mapping[str, Callable[..., Any]]] = {"surgery": SURGERY, "methods": METHODS, "losses": LOSSES}
"""The tables of the registry by the section of the config whose entries they name."""
ACTS = {
    "surgery": "Surgery: changes the model at once, before any training.",
    "methods": "Acts while training goes on.",
    "losses": "Adds to the loss of the task.",
}
KINDS_OF_METHODS = {
    "prune": "Prune",
    "quantize": "Quantize",
    "factorize": "Factorize",
    "share": "Share",
    "distill": "Distil",
    "peft": "Adapt",
    "bake": "Bake",
}
"""Headings of the folders of `jaxlm/methods`, in the order in which they are read."""
GIVEN = {"lm", "context", "configs", "on_policy"}
"""Arguments that an entry does not set as such: `on_policy` and `configs` of distillation are made from its options."""
VALUES: dict[str, Any] = {
    "budget": 0.25,
    "end": 1000,
    "ffn": 0.5,
    "heads": 0.5,
    "keep": (0, 2),
    "layer_map": (0, 0, 1, 1),
    "share": 0.5,
    "size": 0.5,
    "sparsity": 0.5,
    "teacher": "runs/teacher/model",
}
"""What an example says where an option has no default, or one that changes nothing."""
REPRODUCED = {"sst2": "SST-2", "wnut": "WNUT-17", "gpt": "GPT over characters"}
"""Pipelines of `configs/reproduce` and the models that they are about."""


class Entry(NamedTuple):
    """A line of the registry: the section of a config that it stands in, its name and its function."""

    section: str
    name: str
    function: Callable[..., Any]

    @property
    def kind(self) -> str:
        """The folder of `jaxlm/methods` that it lies in."""
        return self.function.__module__.split(".")[2]

    @property
    def page(self) -> str:
        """Its page."""
        return f"{self.section}/{self.name}.md"

    @property
    def title(self) -> str:
        """Its name, with its section where two sections have the name."""
        twice = sum(self.name in table for table in TABLES.values()) > 1
        return f"{self.name} ({self.section})" if twice else self.name

    @property
    def description(self) -> Description:
        """What its docstring says."""
        return describe(self.function)

    @property
    def options(self) -> dict[str, Any]:
        """Defaults of what an entry of a config may set, by name; `inspect.Parameter.empty` where there are none."""
        parameters = inspect.signature(self.function).parameters
        options = {name: p.default for name, p in parameters.items() if name not in GIVEN}
        if "configs" in parameters:
            of_a_teacher = inspect.signature(DistillConfig).parameters
            options = {"teacher": inspect.Parameter.empty} | options | {n: of_a_teacher[n].default for n in TERMS}
        return options

    @property
    def example(self) -> dict[str, Any]:
        """An entry that works: every option with its default, but for those that need a value; without `None`."""
        values = {
            name: VALUES.get(name, default) if unset(default) else default for name, default in self.options.items()
        }
        return {"name": self.name} | {name: value for name, value in values.items() if value is not None}

    @property
    def config(self) -> str:
        """The example as the line of a recipe."""
        lines = [f'        "{name}": {literal(value)},' for name, value in self.example.items()]
        return "\n".join([f"config.{self.section} = (", "    {", *lines, "    },", ")"])


def unset(default: Any) -> bool:
    """Whether a default has to be replaced, or changes nothing."""
    return default is inspect.Parameter.empty or default is None or default == 0


def literal(value: Any) -> str:
    """A value as recipes write it.

    >>> print(literal(r".*layers_\\d+"), literal(({"bits": "int4"},)))
    r".*layers_\\d+" ({"bits": "int4"},)
    """
    if isinstance(value, str) and "\\" in value:
        return f'r"{value}"'
    return repr(value).replace("'", '"')


TERMS = ("temperature", "divergence", "hidden", "attention", "relations")
"""The options of a teacher that an example of distillation shows."""


def entries() -> list[Entry]:
    """Every line of the registry, by kind and name."""
    every = [Entry(section, name, function) for section, table in TABLES.items() for name, function in table.items()]
    return sorted(every, key=lambda entry: (list(KINDS_OF_METHODS).index(entry.kind), entry.name, entry.section))


def method_page(entry: Entry) -> str:
    """The page of a method: what, when, config, options and API, paper, measured."""
    description = entry.description
    path = f"{entry.function.__module__}.{entry.function.__name__}"
    return "\n\n".join(
        [
            f"# {entry.title}",
            f"*{ACTS[entry.section]} An entry of `config.{entry.section}`.*",
            "## What it does",
            description.what,
            "## When to use it",
            linked(description.when, entry),
            "## Config",
            f"```python\n{entry.config}\n```",
            "## Options and API",
            *([TEACHER_OPTIONS, options_table(DistillConfig)] if "teacher" in entry.options else []),
            f"::: {path}\n    options:\n      show_docstring_description: false",
            "## Paper",
            papers(description.source),
            "## Measured",
            measured(entry),
        ]
    )


TEACHER_OPTIONS = "Of each teacher (`teacher` is the name of a stage or a model directory):"


def options_table(settings: type) -> str:
    """The fields of a dataclass as a table."""
    rows = [f"| `{f.name}` | {cell(f.default)} | {f.meaning} |" for f in fields(settings)]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def linked(text: str, source: Entry) -> str:
    """A text with the methods that it names linked to their pages, of the same section where two have the name."""
    pages = {e.name: e.page for e in sorted(entries(), key=lambda e: e.section == source.section)}
    pages.pop(source.name, None)
    return re.sub(r"`(\w+)`", lambda m: f"[{m[0]}](../{pages[m[1]]})" if m[1] in pages else m[0], text)


def papers(source: str) -> str:
    """A source with its arXiv numbers as links.

    >>> papers("Hu et al. 2021, arXiv:2106.09685.")
    'Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685).'
    """
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", source)


def methods_index() -> str:
    """All methods on one page, by kind."""
    lines = ["# Methods", "", "One page each: what it does, when to use it, config, options, paper, what it measured."]
    for kind, heading in KINDS_OF_METHODS.items():
        lines += ["", f"## {heading}", "", "| name | entry of | when |", "|---|---|---|"]
        lines += [
            f"| [`{e.name}`](../{e.page}) | `config.{e.section}` | {linked(e.description.when, e)} |"
            for e in entries()
            if e.kind == kind
        ]
    return "\n".join(lines)


# Measured -------------------------------------------------------------------------------------------------------------


def measured(entry: Entry) -> str:
    """The rows of docs/results.md about models that went through a method: those whose stages name it."""
    tables = []
    for pipeline, words in REPRODUCED.items():
        header, rows = reproduced(pipeline)
        stages = [stage for stage in pipeline_stages(pipeline) if names(stage, entry) and stage["name"] in rows]
        if stages:
            lines = [f"| stage | what was done | {' | '.join(header)} |", f"|{'---|' * (len(header) + 2)}"]
            lines += [
                f"| {stage['name']} | {stage['description']} | {' | '.join(rows[stage['name']])} |" for stage in stages
            ]
            tables.append(f"**{words}**\n\n" + "\n".join(lines))
    if not tables:
        return "Not measured yet."
    return "\n\n".join(
        [
            "Stages of `configs/reproduce` that name it. Everything that was measured is in [results](../results.md).",
            *tables,
        ]
    )


def pipeline_stages(pipeline: str) -> Sequence[Mapping[str, Any]]:
    """The stages of a reproduced pipeline."""
    return plain(importlib.import_module(f"configs.reproduce.{pipeline}").get_config())["stages"]


def names(stage: Mapping[str, Any], entry: Entry) -> bool:
    """Whether a stage of a pipeline has an entry of this method."""
    return any(other["name"] == entry.name for other in stage.get(entry.section, ()))


SHOWN = ("Size on disk", "Tokens/s in batches", "Accuracy", "Entity F1", "Bits per byte")
"""Columns of the reports that a method's page repeats."""


def reproduced(pipeline: str) -> tuple[list[str], dict[str, list[str]]]:
    """The columns of a table of models in docs/results.md, and its rows by the name of the stage."""
    text = (ROOT / "docs/results.md").read_text("utf-8")
    block = text.split(f"<!-- reproduce: {pipeline} -->")[1].split(f"<!-- end: {pipeline} -->")[0]
    table = [row(line) for line in block.split("\n| model |")[1].splitlines()]
    header = table[0]
    shown = [i for i, column in enumerate(header) if column in SHOWN]
    rows = {cells[0]: [cells[i + 1] for i in shown] for cells in table[2:] if cells}
    return [header[i] for i in shown], rows


def row(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [text.strip() for text in line.strip().strip("|").split(" | ")] if line.strip() else []


# Config ---------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[type, ...]] = {
    "": (RunSettings,),
    "model": (ModelSettings, ModelConfig),
    "data": (DataSettings,),
    "train": (TrainSettings,),
    "calibration": (CalibrationSettings,),
    "mesh": (MeshSettings,),
    "report": (ReportSettings,),
    "search": (SearchSettings,),
}
"""The classes that the sections of a config are read into."""
SHARDING = """## config.sharding

Its keys are axis names of the model, its values axes of the mesh, where the defaults are not what you want: `embed`
over `fsdp`; `kv_heads`, `ffn` and `vocab` over `tensor`."""
CONFIG_INTRODUCTION = """Every field that a recipe or the command line may set (`--config.train.learning_rate=5e-5`). A
field that does not exist is an error that names the nearest one. What entries of `surgery`, `methods` and `losses` may
say is on the [page of each method](methods/index.md)."""


class Field(NamedTuple):
    """One field of a config."""

    name: str
    type: str
    default: Any
    meaning: str


def fields(settings: type) -> list[Field]:
    """The fields of a dataclass with what its docstring says of each."""
    hints = KINDS if settings is ModelConfig else typing.get_type_hints(settings)
    names = [field.name for field in dataclasses.fields(settings)]
    by_name = meanings(section(inspect.getdoc(settings) or "", "Attributes"), names)
    return [
        Field(field.name, type_name(hints[field.name]), field.default, by_name.get(field.name, ""))
        for field in dataclasses.fields(settings)
    ]


def type_name(hint: Any) -> str:
    """A type as it is written.

    >>> type_name(int | None), type_name(Any), type_name(float)
    ('int | None', 'any', 'float')
    """
    if hint is Any:
        return "any"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else re.sub(r"\w+\.", "", str(hint))


def config_fields() -> Iterator[tuple[str, Field]]:
    """`(section, field)` of everything that a config has, with the defaults of the config."""
    config = default_config()
    for name, classes in SETTINGS.items():
        values = config[name] if name else config
        for field in (field for settings in classes for field in fields(settings)):
            if field.name in values:
                yield name, field._replace(default=values[field.name])


def config_page() -> str:
    """The config reference."""
    lines = ["# Config reference", "", CONFIG_INTRODUCTION]
    for name, classes in SETTINGS.items():
        summary = (inspect.getdoc(classes[0]) or "").splitlines()[0]
        lines += ["", f"## config.{name}" if name else "## config", "", summary, ""]
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{field.name}` | `{field.type}` | {cell(field.default)} | {field.meaning} |"
            for of, field in config_fields()
            if of == name
        ]
        if name == "mesh":
            lines += ["", SHARDING]
    return "\n".join(lines)


def cell(default: Any) -> str:
    """A default in a table."""
    return "" if default is dataclasses.MISSING else f"`{default!r}`"


# README and notebook --------------------------------------------------------------------------------------------------


ROOT_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the repository's root."""


def site_page(text: str) -> str:
    """A page of the repository's root as one of the site: its links lead to pages, and to files only in words."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    for page, file in ROOT_PAGES.items():
        text = text.replace(f"]({file})", f"]({page})")
    return re.sub(r"\[([^\]]+)\]\((?:(?:jaxlm|configs|tests)/[^)]*|LICENSE|CITATION\.cff)\)", r"\1", text)


def part(text: str, heading: str) -> str:
    """What stands below a heading, or begins with words in bold, up to the next of its kind."""
    for opening, closing in ((f"## {heading}\n", "\n## "), (f"**{heading}", "\n## |\n\\*\\*")):
        if opening in text:
            return re.split(closing, text.split(opening, 1)[1].removeprefix(".**"))[0].strip()
    raise ValueError(f"no part is called {heading!r}")


def included(text: str) -> str:
    """A page with each `<!-- include: FILE, heading -->` replaced by that part of a file of the root."""

    def replacement(match: re.Match[str]) -> str:
        return site_page(part((ROOT / match[1]).read_text("utf-8"), match[2]))

    return re.sub(r"<!-- include: (\S+), (.+?) -->", replacement, text)


def code_cells(notebook: Mapping[str, Any]) -> list[str]:
    """The code of a notebook, cell by cell."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def notebook_page(text: str) -> str:
    """A notebook as Markdown: code, and what it printed."""
    blocks = []
    for notebook_cell in json.loads(text)["cells"]:
        source = "".join(notebook_cell["source"])
        blocks.append(source if notebook_cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in notebook_cell.get("outputs", ()):
            blocks.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    return "\n\n".join(blocks)
