"""Reproduction: every pipeline under configs/reproduce, and the tables of a document that follow from their reports."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxlm.evaluate.comparison import ModelResult, by_name
from jaxlm.report import document
from jaxlm.report.acceptance import Criterion, Results
from jaxlm.report.document import cells
from jaxlm.runner import pipeline
from jaxlm.runner.config import plain

DATA, ENCODER = "DATA", "ENCODER"
"""What these recipes write for the folder of public data and for the directory of the pretrained encoder."""


def recipes(folder: Path) -> dict[str, Path]:
    """The runs, in order of name: files with `get_config()`, and `criteria(results)` on its report."""
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def read(path: Path) -> ModuleType:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"reproduce_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def located(config: ConfigDict, data: str, encoder: str) -> ConfigDict:
    """The config with the folder of data and the encoder in the place of their names."""

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(put(item) for item in value)
        if value == ENCODER:
            return encoder
        return data + value[len(DATA) :] if isinstance(value, str) and value.startswith(f"{DATA}/") else value

    located_config = config.copy_and_resolve_references()
    for name, value in plain(config.data).items():
        if isinstance(value, str):
            located_config.data[name] = put(value)
    located_config.model.init, located_config.stages = put(config.model.init), put(plain(config.stages))
    return located_config


def table(rows: Sequence[ModelResult]) -> str:
    """Every model in short, in Markdown: the report's columns, each with what it is against the reference."""
    named = by_name(rows)
    shown = ("Parameters", "Size on disk", "Tokens/s in batches", "Latency at batch 1")
    labels = [cell.label for cell in cells(rows[0], named)]
    quality = [labels[labels.index("Latency at batch 1") + 1], labels[labels.index("Peak memory") - 1]]
    lines = [f"| model | {' | '.join((*shown, *quality))} |", "|---|" + "---|" * (len(shown) + len(quality))]
    for row in rows:
        by_label = {cell.label: cell for cell in cells(row, named)}
        entries = [
            by_label[label].value + (f" ({by_label[label].note})" if by_label[label].note else "")
            for label in (*shown, *quality)
        ]
        lines.append(f"| {row.name} | {' | '.join(entries)} |")
    return "\n".join(lines)


def criteria_table(criteria: Sequence[Criterion]) -> str:
    """What was measured, and the targets, in Markdown."""
    lines = ["| what | measured | target | passed |", "|---|---|---|---|"]
    said = {True: "yes", False: "**no**", None: "open"}
    lines += [f"| {c.what} | {c.measured} | {c.target} | {said[c.passed]} |" for c in criteria]
    return "\n".join(lines)


def rewritten(text: str, name: str, content: str) -> str:
    """A document with new content between `<!-- reproduce: name -->` and `<!-- end: name -->`.

    Raises:
      ValueError: where the markers are not there.

    >>> rewritten("a\\n<!-- reproduce: x -->\\nold\\n<!-- end: x -->\\nb", "x", "new").splitlines()
    ['a', '<!-- reproduce: x -->', 'new', '<!-- end: x -->', 'b']
    """
    first, last = f"<!-- reproduce: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the document has no place for {name}: lines with {first} and {last}")
    return pattern.sub(lambda _: f"{first}\n{content}\n{last}", text, count=1)


def run(
    folder: Path, workdir: Path, results: Path, data: str, encoder: str, only_tables: bool = False
) -> list[Criterion]:
    """Runs what is not finished, and rewrites the tables of a document after every recipe.

    Args:
      folder: of the recipes; workdir: of their pipelines, one folder each; results: the document with the tables.
      data: folder of public data; encoder: directory of the pretrained encoder.
      only_tables: nothing is run; tables follow from the reports that are there.

    Returns:
      every criterion of every report.
    """
    all_criteria: list[Criterion] = []
    for name, path in recipes(folder).items():
        recipe = read(path)
        if only_tables:
            if not (workdir / name / "report.json").exists():
                continue
            rows = document.read(workdir / name / "report.json")
        else:
            rows = pipeline.run(located(recipe.get_config(), data, encoder), workdir / name)
        criteria = recipe.criteria(Results(rows))
        content = f"{criteria_table(criteria)}\n\n{table(rows)}"
        results.write_text(rewritten(results.read_text(encoding="utf-8"), name, content), encoding="utf-8")
        all_criteria += criteria
    return all_criteria
