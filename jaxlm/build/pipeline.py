"""A pipeline: stages from model directory to model directory, each done once, and a report over all of them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from jaxlm.build import stage
from jaxlm.build.comparison import Candidate, Trial, compare_models, protocol
from jaxlm.build.config import code_version, default_config, digest, overlay, plain
from jaxlm.core import lookup, nearest
from jaxlm.evaluate import report
from jaxlm.evaluate.row import Row

STAGE_FIELDS = ("name", "description", "after", "reference", "beside")
"""What a stage says of itself; its other entries are sections of its config."""


def stage_config(config: ConfigDict, entry: Mapping[str, Any], done: Mapping[str, Path]) -> ConfigDict:
    """The config of one stage: the pipeline's, overlaid with the stage's own sections.

    `after` names the stage whose model it starts from (the pipeline's `model` section then does not apply), and a
    `teacher` may be the name of a stage too.
    """
    own = default_config()
    overlay(own, {k: v for k, v in plain(config).items() if k not in ("stages", "report")}, "config")
    if entry.get("after"):
        own.model = default_config().model
        own.model.init = str(lookup(done, entry["after"], "stage (stages come in order)") / "model")
    overlay(own, {k: v for k, v in entry.items() if k not in STAGE_FIELDS}, f"stage {entry['name']}: config")
    own.losses = tuple(
        {**loss, "teacher": str(done[loss["teacher"]] / "model")} if loss.get("teacher") in done else loss
        for loss in plain(own.losses)
    )
    return own


def fingerprint(config: ConfigDict, done: Mapping[str, Path], code: str) -> str:
    """sha256 of a stage's inputs: its config, the code, and the parameters of the models that it reads."""
    values = plain(config)
    read = [values["model"]["init"], *(loss.get("teacher", "") for loss in values["losses"])]
    hashes = [
        json.loads((path / "result.json").read_text())["params_sha256"]
        for path in done.values()
        if str(path / "model") in read
    ]
    return digest([values, code, hashes])


def run_stage(config: ConfigDict, workdir: Path, name: str, inputs: str, console: Console) -> dict[str, Any]:
    """Runs a stage, or returns its result where it is finished with these very inputs.

    A directory made with other inputs is moved to `<name>.previous` and the stage runs again.
    """
    record = workdir / "inputs.json"
    if workdir.exists() and (not record.exists() or json.loads(record.read_text())["sha256"] != inputs):
        previous = workdir.with_name(f"{name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        workdir.rename(previous)
        console.print(f"[bold]{name}[/]: its inputs changed; the run before is in {previous}")
    workdir.mkdir(parents=True, exist_ok=True)
    stage.write_json(record, {"sha256": inputs})
    finished = (workdir / "result.json").exists()
    result = stage.run(config, workdir, name)
    if finished:
        console.print(f"[bold]{name}[/]: finished before")
    return result


def run(config: ConfigDict, workdir: Path) -> list[Row]:
    """Runs every stage of `config.stages` in order, then measures and reports.

    Returns:
      the rows of the report, which lies in `workdir/report.html`, `.md`, `.json` and `pareto.png`.
    """
    console, workdir, code = Console(stderr=True), workdir.resolve(), code_version()
    workdir.mkdir(parents=True, exist_ok=True)
    done: dict[str, Path] = {}
    results: dict[str, dict[str, Any]] = {}
    configs: dict[str, ConfigDict] = {}
    prints: list[str] = []
    for entry in plain(config.stages):
        name = entry["name"]
        if name in done:
            raise ValueError(f"two stages are called {name!r}")
        own = stage_config(config, entry, done)
        prints.append(fingerprint(own, done, code))
        results[name] = run_stage(own, workdir / name, name, prints[-1], console)
        done[name], configs[name] = workdir / name, own
    return write_report(config, workdir, done, results, configs, digest(prints), console)


def write_report(config, workdir, done, results, configs, inputs, console) -> list[Row]:
    """Compares the models of all stages, unless the report is of these very models."""
    entries = plain(config.stages)
    candidates = [
        Candidate(
            entry["name"],
            entry["description"],
            done[entry["name"]] / "model",
            reference=entry.get("reference"),
            beside=tuple(entry.get("beside", ())),
            train_tokens=results[entry["name"]]["tokens"] or None,
        )
        for entry in entries
    ]
    first = stage.set_up(configs[entries[0]["name"]], splits=("eval",), say=console.print)
    batches = first.task.batches(first.splits["eval"], first.tokenizer, first.data, config.report.batch_size, None)
    trial = Trial(
        batches,
        first.tokenizer,
        context=first.data.max_length,
        batch_size=config.report.batch_size,
        prompt=config.report.prompt,
        rounds=config.report.rounds,
        seconds=config.report.seconds,
    )
    rows = compare_models(candidates, trial, console.print)
    how = protocol(trial, config.report.corpus, rows, config.seed)
    page = report.write(workdir, rows, how, title=config.report.title)
    stage.write_json(workdir / "report.inputs.json", {"sha256": inputs})
    console.print(report.table(rows))
    console.print(f"report: {page}")
    return rows
