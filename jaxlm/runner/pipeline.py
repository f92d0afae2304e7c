"""A pipeline: stages from model directory to model directory, each done once, and a report over all of them."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from jaxlm.core import lookup
from jaxlm.core.strict_json import digest
from jaxlm.data.settings import DataSettings
from jaxlm.evaluate.benchmark import Candidate, Trial, compare_models, protocol
from jaxlm.evaluate.comparison import ModelResult
from jaxlm.evaluate.settings import ReportSettings
from jaxlm.io.pretrained import load
from jaxlm.report import document
from jaxlm.runner import stage
from jaxlm.runner.artifacts import PLACEMENT, data_contents
from jaxlm.runner.code_version import code_version
from jaxlm.runner.config import default_config, overlay, plain
from jaxlm.runner.distillation import map_teachers, teachers_in
from jaxlm.tasks import TASKS

STAGE_FIELDS = ("name", "description", "after", "reference", "beside", "compare")
"""What a stage says of itself; its other entries are sections of its config."""


def stage_config(config: ConfigDict, entry: Mapping[str, Any], done: Mapping[str, Path]) -> ConfigDict:
    """The config of one stage: the pipeline's, overlaid with the stage's own sections.

    `after` names the stage whose model it starts from (the pipeline's `model` section then does not apply), and a
    `teacher` may be the name of a stage too.
    """
    settings = default_config()
    overlay(settings, {k: v for k, v in plain(config).items() if k not in ("stages", "report", "search")}, "config")
    if entry.get("after"):
        settings.model = default_config().model
        settings.model.init = str(lookup(done, entry["after"], "stage (stages come in order)") / "model")
    overlay(settings, {k: v for k, v in entry.items() if k not in STAGE_FIELDS}, f"stage {entry['name']}: config")
    settings.losses = map_teachers(
        plain(settings.losses), lambda name: str(done[name] / "model") if name in done else name
    )
    return settings


def fingerprint(config: ConfigDict, done: Mapping[str, Path], code: str) -> str:
    """sha256 of a stage's inputs: its config, the code, its data, and the parameters of the models that it reads.

    Where it runs (`PLACEMENT`) is no input: a stage that is done is done.
    """
    values = {name: value for name, value in plain(config).items() if name not in PLACEMENT}
    read = [values["model"]["init"], *teachers_in(values["losses"])]
    hashes = [
        json.loads((path / "result.json").read_text())["params_sha256"]
        for path in done.values()
        if str(path / "model") in read
    ]
    data = [file["sha256"] for files in data_contents(config).values() for file in files.values()]
    return digest([values, code, data, hashes])


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


def check_stages(config: ConfigDict) -> None:
    """Raises ValueError for a pipeline that could not be run and reported to its end, before anything runs."""
    if not config.stages:
        raise ValueError("config.stages is empty; jaxlm train runs a config without stages")
    lookup(TASKS, config.task, "task")
    report_settings(config)
    names: list[str] = []
    for number, entry in enumerate(plain(config.stages)):
        for field in ("name", "description"):
            if not entry.get(field):
                raise ValueError(f"config.stages[{number}] needs a {field}")
        name = entry["name"]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"a stage called {name!r} has no place in the workdir; use letters, digits, '.', '_', '-'")
        if name in names:
            raise ValueError(f"two stages are called {name!r}")
        names.append(name)
        if entry.get("task", config.task) != config.task and entry.get("compare", True):
            raise ValueError(
                f"stage {name} has the task {entry['task']!r}, the report is about {config.task!r}; "
                "give the stage compare=False"
            )
    compared = [entry["name"] for entry in plain(config.stages) if entry.get("compare", True)]
    if not compared:
        raise ValueError("every stage has compare=False; a report needs a model")
    for entry in plain(config.stages):
        for other in filter(None, [entry.get("reference"), *entry.get("beside", ())]):
            lookup(dict.fromkeys(compared), other, f"stage that {entry['name']} is compared with:")


class Finished(NamedTuple):
    """A stage that is done: its entry in the config, where it lies, its result, and the hash of its inputs."""

    entry: dict[str, Any]
    workdir: Path
    result: dict[str, Any]
    inputs: str


def run(config: ConfigDict, workdir: Path) -> list[ModelResult]:
    """Runs every stage of `config.stages` in order, then measures and reports.

    Returns:
      the rows of the report, which lies in `workdir/report.html`, `.md`, `.json` and `pareto.png`.
    """
    check_stages(config)
    console, workdir = Console(stderr=True), workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    stages = run_stages(config, lambda name, inputs: workdir / name, console)
    descriptions = [{field: stage.entry.get(field) for field in STAGE_FIELDS} for stage in stages]
    code = code_version("jaxlm.runner.pipeline")
    inputs = digest([plain(config.report), descriptions, code, *(stage.inputs for stage in stages)])
    rows = measured_rows(config, workdir, stages, inputs, console)
    console.print(document.table(rows))
    console.print(f"report: {workdir / 'report.html'}")
    return rows


def run_stages(config: ConfigDict, directory_of: Callable[[str, str], Path], console: Console) -> list[Finished]:
    """Every stage of `config.stages` in order; `directory_of(name, hash of its inputs)` is where a stage lies."""
    code = code_version()
    done: dict[str, Path] = {}
    stages: list[Finished] = []
    for entry in plain(config.stages):
        name = entry["name"]
        stage_settings = stage_config(config, entry, done)
        inputs = fingerprint(stage_settings, done, code)
        done[name] = directory_of(name, inputs)
        stages.append(Finished(entry, done[name], run_stage(stage_settings, done[name], name, inputs, console), inputs))
    return stages


def candidate(name: str, stages: Mapping[str, Finished]) -> Candidate:
    """The model of a stage, as the report presents it."""
    stage = stages[name]
    return Candidate(
        stage.entry["name"],
        stage.entry["description"],
        stage.workdir / "model",
        reference=stage.entry.get("reference"),
        beside=tuple(stage.entry.get("beside", ())),
        train_tokens=stage.result["tokens"] or None,
        facts=facts([stage.result for stage in lineage(name, stages)]),
    )


def measured_rows(
    config: ConfigDict, workdir: Path, stages: Sequence[Finished], inputs: str, console: Console
) -> list[ModelResult]:
    """Compares the models of all stages and writes the report, unless the one there is of these very models."""
    record = workdir / "report.inputs.json"
    if record.exists() and json.loads(record.read_text())["sha256"] == inputs:
        return document.read(workdir / "report.json")
    named = {stage.entry["name"]: stage for stage in stages}
    candidates = [candidate(name, named) for name, stage in named.items() if stage.entry.get("compare", True)]
    rows = write_report(config, workdir, candidates, console)
    stage.write_json(record, {"sha256": inputs})
    return rows


def report_settings(config: ConfigDict) -> ReportSettings:
    """How a config's report measures; raises ValueError where there is nothing to measure on."""
    settings = ReportSettings(**config.report)
    if not config.data[settings.split]:
        raise ValueError(f"config.data.{settings.split} is empty; the report measures on it (config.report.split)")
    return settings


def write_report(
    config: ConfigDict, workdir: Path, candidates: Sequence[Candidate], console: Console
) -> list[ModelResult]:
    """Measures models beside each other as `config.report` says, and writes the report."""
    settings = report_settings(config)
    trial = Trial(config.task, DataSettings(**config.data), settings)
    rows = compare_models(candidates, trial, console.print)
    how = protocol(trial, rows, load(candidates[0].directory), config.seed)
    document.write(workdir, rows, how, title=settings.title or "Which model to ship", tolerance=settings.tolerance)
    return rows


def lineage(name: str, stages: Mapping[str, Finished]) -> list[Finished]:
    """The stages that a model comes from, by `after`, the first one first and its own last."""
    before = stages[name].entry.get("after")
    return [*(lineage(before, stages) if before else []), stages[name]]


def facts(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the report says of a model beyond what can be measured of it: what the stages that it comes from were
    calibrated on, what the answers of their teachers take on disk, and how long they trained."""
    lines: dict[str, list[str]] = {"Calibrated on": [], "Teacher's answers on disk": [], "Training": []}
    for result in results:
        if read := result["data"].get("calibration"):
            lines["Calibrated on"] += [f"{read['samples']:,} rows, {read['tokens']:,} tokens of {read['source']}"]
        for cache in result.get("teacher_caches", ()):
            lines["Teacher's answers on disk"] += [f"{cache['bytes_per_token']:.1f} bytes per token"]
        if result["steps"]:
            lines["Training"] += [f"{result['steps']:,} steps in {result['train_seconds']:.0f} s"]
    return {name: ", then ".join(values) for name, values in lines.items() if values}
