"""A pipeline: stages from model directory to model directory, each done once, and a report over all of them."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from jaxlm.build import stage
from jaxlm.build.comparison import Candidate, Trial, compare_models, protocol
from jaxlm.build.config import code_version, default_config, digest, overlay, plain
from jaxlm.build.lessons import teacher_places, teachers_in
from jaxlm.core import lookup
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
    own.losses = teacher_places(plain(own.losses), lambda name: str(done[name] / "model") if name in done else name)
    return own


def fingerprint(config: ConfigDict, done: Mapping[str, Path], code: str) -> str:
    """sha256 of a stage's inputs: its config, the code, and the parameters of the models that it reads."""
    values = plain(config)
    read = [values["model"]["init"], *teachers_in(values["losses"])]
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


def check_stages(config: ConfigDict) -> None:
    """Raises ValueError for a pipeline that could not be run and reported to its end, before anything runs."""
    if not config.stages:
        raise ValueError("config.stages is empty; experiments/train.py runs a config without stages")
    if config.task != "causal":
        raise ValueError(f"config.task is {config.task!r}; reports compare causal models only")
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
    for entry in plain(config.stages):
        for other in filter(None, [entry.get("reference"), *entry.get("beside", ())]):
            lookup(dict.fromkeys(names), other, f"stage that {entry['name']} is compared with:")


class Finished(NamedTuple):
    """A stage that is done: its entry in the config, its own config, where it lies, and its result."""

    entry: dict[str, Any]
    config: ConfigDict
    workdir: Path
    result: dict[str, Any]


def run(config: ConfigDict, workdir: Path) -> list[Row]:
    """Runs every stage of `config.stages` in order, then measures and reports.

    Returns:
      the rows of the report, which lies in `workdir/report.html`, `.md`, `.json` and `pareto.png`.
    """
    check_stages(config)
    console, workdir, code = Console(stderr=True), workdir.resolve(), code_version()
    workdir.mkdir(parents=True, exist_ok=True)
    done: dict[str, Path] = {}
    stages: list[Finished] = []
    inputs: list[str] = [digest(plain(config.report))]
    for entry in plain(config.stages):
        name = entry["name"]
        own = stage_config(config, entry, done)
        inputs.append(fingerprint(own, done, code))
        result = run_stage(own, workdir / name, name, inputs[-1], console)
        done[name] = workdir / name
        stages.append(Finished(entry, own, workdir / name, result))
    rows = measured_rows(config, workdir, stages, digest(inputs), console)
    console.print(report.table(rows))
    console.print(f"report: {workdir / 'report.html'}")
    return rows


def measured_rows(
    config: ConfigDict, workdir: Path, stages: Sequence[Finished], inputs: str, console: Console
) -> list[Row]:
    """Compares the models of all stages and writes the report, unless the one there is of these very models."""
    record = workdir / "report.inputs.json"
    if record.exists() and json.loads(record.read_text())["sha256"] == inputs:
        return report.read(workdir / "report.json")
    candidates = [
        Candidate(
            entry["name"],
            entry["description"],
            path / "model",
            reference=entry.get("reference"),
            beside=tuple(entry.get("beside", ())),
            train_tokens=result["tokens"] or None,
        )
        for entry, _, path, result in stages
    ]
    first = stage.set_up(stages[0].config, splits=("eval",), say=console.print)
    settings = config.report
    trial = Trial(
        first.task.batches(first.splits["eval"], first.tokenizer, first.data, settings.batch_size, None),
        first.tokenizer,
        context=first.data.max_length,
        batch_size=settings.batch_size,
        prompt=settings.prompt,
        rounds=settings.rounds,
        seconds=settings.seconds,
    )
    rows = compare_models(candidates, trial, console.print)
    report.write(workdir, rows, protocol(trial, settings.corpus, rows, config.seed), title=settings.title)
    stage.write_json(record, {"sha256": inputs})
    return rows
