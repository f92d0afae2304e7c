"""Search: a pipeline run again and again with other strengths of its methods, and the front of what that reached."""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from jaxlm.core import lookup, nearest
from jaxlm.core.extras import require
from jaxlm.data.settings import DataSettings
from jaxlm.evaluate.benchmark import Candidate, Trial, compare_models
from jaxlm.evaluate.comparison import ModelResult, compare
from jaxlm.evaluate.settings import COSTS, ReportSettings, SearchSettings
from jaxlm.report import document, pareto_plot
from jaxlm.runner import registry, stage
from jaxlm.runner.config import default_config, plain
from jaxlm.runner.pipeline import candidate, check_stages, run_stages, write_report

TABLES: dict[str, Mapping[str, Any]] = {
    "surgery": registry.SURGERY,
    "methods": registry.METHODS,
    "losses": registry.LOSSES,
}
REFUSED = "refused"
"""Why a trial cannot be done: an attribute of it in the study."""
MOST_SHOWN = 16
"""Models in a report; where there are more, those off the front are left out."""


class Space:
    """The strengths that a search varies, and a config with values for them."""

    def __init__(self, config: ConfigDict):
        self.config, self.settings = config, SearchSettings(**plain(config.search))
        self.stages = {entry["name"]: entry for entry in plain(config.stages)}
        self.strengths: dict[str, Mapping[str, Any]] = {}
        for strength in self.settings.vary:
            entry = lookup(self.stages, strength["stage"], "stage in config.search.vary:")
            for field in fields(strength):
                check_field(entry, field)
            self.strengths[f"{strength['stage']}.{fields(strength)[0]}"] = strength
        if not self.strengths:
            raise ValueError("config.search.vary is empty; name a stage, a field, and its low and high")
        last = self.settings.stage or list(self.stages)[-1]
        self.stage = lookup(self.stages, last, "stage in config.search.stage:")
        if not self.stage.get("reference"):
            raise ValueError(f"stage {last} has no reference; a search needs a model to compare with")

    def with_values(self, values: Mapping[str, Any]) -> ConfigDict:
        """The pipeline with these strengths."""
        config = self.config.copy_and_resolve_references()
        stages = {name: plain(entry) for name, entry in self.stages.items()}
        for name, value in values.items():
            for field in fields(self.strengths[name]):
                put(stages[self.strengths[name]["stage"]], field.split("."), value)
        config.stages = tuple(stages.values())
        return config

    def planned(self) -> list[dict[str, Any]]:
        """Values that are tried first: an even sweep of one strength, all combinations where they fit, or the ends."""
        trials, names, varied = self.settings.trials, list(self.strengths), self.strengths.values()
        sets = [options(strength, trials if len(names) == 1 else None) for strength in varied]
        if all(sets) and math.prod(map(len, sets)) <= trials:
            return [dict(zip(names, values, strict=True)) for values in itertools.product(*sets)]
        ends = [(s["values"][0], s["values"][-1]) if "values" in s else (s["low"], s["high"]) for s in varied]
        return [dict(zip(names, values, strict=True)) for values in zip(*ends, strict=True)][:trials]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Values for an optuna trial."""
        values = {}
        for name, strength in self.strengths.items():
            if "values" in strength:
                values[name] = trial.suggest_categorical(name, tuple(strength["values"]))
                continue
            draw = trial.suggest_int if whole(strength) else trial.suggest_float
            values[name] = draw(name, strength["low"], strength["high"], log=strength.get("log", False))
        return values


def fields(strength: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that get the value."""
    return (strength["field"],) if isinstance(strength["field"], str) else tuple(strength["field"])


def whole(strength: Mapping[str, Any]) -> bool:
    return isinstance(strength["low"], int) and isinstance(strength["high"], int)


def options(strength: Mapping[str, Any], count: int | None) -> list[Any]:
    """The values of a strength, `count` of them evenly spread where they are a range; none without a count.

    >>> options({"low": 0.0, "high": 0.9, "field": "", "stage": ""}, 4)
    [0.0, 0.3, 0.6, 0.9]
    >>> options({"low": 1, "high": 64, "log": True, "field": "", "stage": ""}, 4)
    [1, 4, 16, 64]
    """
    if "values" in strength:
        return list(strength["values"])
    if count is None:
        return []
    spread = np.geomspace if strength.get("log") else np.linspace
    values = spread(strength["low"], strength["high"], count).tolist()
    return list(dict.fromkeys(round(v) if whole(strength) else float(f"{v:.4g}") for v in values))


def check_field(entry: Mapping[str, Any], path: str) -> None:
    """Raises ValueError for a field that the stage could not have, naming the nearest."""
    section, *rest = path.split(".")
    what = f"config.search.vary: stage {entry['name']}"
    if section in TABLES:
        if len(rest) < 2 or not rest[0].isdecimal() or int(rest[0]) >= len(entry.get(section, ())):
            raise ValueError(f"{what} has {len(entry.get(section, ()))} entries of {section}; write {section}.0.option")
        chosen = entry[section][int(rest[0])]
        function = lookup(TABLES[section], chosen["name"], f"entry of {section}")
        options = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
        if section != "losses" and rest[1] not in options:
            raise ValueError(f"{what}: {chosen['name']} has no option {rest[1]!r}; {nearest(rest[1], options)}")
        return
    config = default_config()
    if section not in config or (rest and rest[0] not in config[section]):
        raise ValueError(f"{what} has no field {path!r}; {nearest(path, config.keys())}")


def put(tree: Any, path: Sequence[str], value: Any) -> None:
    """Sets a value in nested dicts and lists.

    >>> stage = {"surgery": [{"name": "prune"}]}
    >>> put(stage, ["surgery", "0", "ffn"], 0.5)
    >>> stage
    {'surgery': [{'name': 'prune', 'ffn': 0.5}]}
    """
    first, *rest = path
    if not rest:
        tree[first] = value
        return
    inner = tree[int(first)] if isinstance(tree, list) else tree.setdefault(first, {})
    put(inner, rest, value)


def run(config: ConfigDict, workdir: Path) -> list[ModelResult]:
    """Tries strengths until there are `config.search.trials`, then reports on all that were reached.

    The study is in `workdir/study.log` after every trial; stages lie in `workdir/stages` by the hash of their inputs,
    so what trials have in common is done once. Re-run, the search goes on where it was, in the middle of a trial
    too.

    Returns:
      the rows of `workdir/report.html`: the reference, and the models of the trials; `workdir/search.json` says what
      was tried, what is on the front and which is at its knee.
    """
    require("optuna", "search")
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    space = Space(config)
    check_stages(config)
    console, workdir = Console(stderr=True), workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: Any = ["maximize", COSTS[space.settings.cost]]
    journal = JournalStorage(JournalFileBackend(str(workdir / "study.log")))
    study = optuna.create_study(study_name="search", storage=journal, load_if_exists=True, directions=directions)
    resume(study, space)
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials), multivariate=True)

    def objective(trial: Any) -> tuple[float, float]:
        values = space.suggest(trial)
        console.print(f"[bold]trial {trial.number}[/]: {described(values)}")
        try:
            models = trial_models(space, values, workdir, console)
            trial.set_user_attr("model", str(models[1].directory))
            reference, row = measured(space, models)
            return score(row, reference, space.settings.cost)
        except ValueError as error:
            trial.set_user_attr(REFUSED, str(error))
            console.print(f"[bold]trial {trial.number}[/] cannot be done: {error}")
            raise

    left = space.settings.trials - len(settled(study))
    if left > 0:
        study.optimize(objective, n_trials=left, catch=(ValueError,))
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not done:
        raise ValueError(f"no trial of the search came to an end; {workdir / 'study.log'} says what was tried")
    return reported(space, done, workdir, console)


def settled(study: Any) -> list[Any]:
    """Trials that need not be done again: those that came to an end, and those that cannot be done."""
    from optuna.trial import TrialState

    return [t for t in study.trials if t.state == TrialState.COMPLETE or REFUSED in t.user_attrs]


def resume(study: Any, space: Space) -> None:
    """Trials that were cut off are begun again; a new study begins with what is planned."""
    from optuna.trial import TrialState

    if not study.trials:
        for values in space.planned():
            study.enqueue_trial(values)
        return
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # the program was killed
        study.tell(trial.number, state=TrialState.FAIL)
    planned = [t.params for t in settled(study)]
    planned += [t.system_attrs.get("fixed_params") for t in study.get_trials(states=(TrialState.WAITING,))]
    for trial in study.get_trials(states=(TrialState.FAIL,)):
        if REFUSED not in trial.user_attrs and trial.params and trial.params not in planned:
            study.enqueue_trial(trial.params)
            planned.append(trial.params)


def described(values: Mapping[str, Any]) -> str:
    """`ffn 0.5, heads 0.25`: the last word of every field, and its value."""
    return ", ".join(
        f"{name.rsplit('.', 1)[-1]} {value:.4g}" if isinstance(value, float) else f"{name.rsplit('.', 1)[-1]} {value}"
        for name, value in values.items()
    )


def trial_models(space: Space, values: Mapping[str, Any], workdir: Path, console: Console) -> list[Candidate]:
    """Runs the pipeline of a trial: the reference and the model that counts."""
    config = space.with_values(values)
    stages = run_stages(config, lambda name, inputs: workdir / "stages" / f"{name}-{inputs[:12]}", console)
    by_name = {stage.entry["name"]: stage for stage in stages}
    candidates = {name: candidate(name, by_name) for name in by_name}
    reference, model = candidates[space.stage["reference"]], candidates[space.stage["name"]]
    return [
        dataclasses.replace(reference, reference=None, beside=()),
        dataclasses.replace(model, name=described(values), beside=()),
    ]


def measured(space: Space, models: Sequence[Candidate]) -> list[ModelResult]:
    """Both models on the eval split: what a search sees is not what its report is about, where that is the test."""
    settings = dataclasses.replace(ReportSettings(**plain(space.config.report)), split="eval", prompt="")
    trial = Trial(space.config.task, DataSettings(**plain(space.config.data)), settings)
    return compare_models(models, trial, lambda text: None)


def score(row: ModelResult, reference: ModelResult, cost: str) -> tuple[float, float]:
    """Quality, more being better, and the cost."""
    comparison = compare(row, reference)
    assert row.quality is not None and row.metric is not None
    if not math.isfinite(row.quality.value):
        raise ValueError(f"{row.name}: its predictions are not numbers")
    quality = row.quality.value if row.metric.higher else -row.quality.value
    costs = {"size": row.bytes_on_disk, "flops": row.flops_per_token}
    for name, ratio in (("speed", comparison.speed), ("latency", comparison.latency)):
        costs[name] = None if ratio is None else ratio.median
    value = costs[cost]
    assert value is not None
    return quality, float(value)


def reported(space: Space, done: Sequence[Any], workdir: Path, console: Console) -> list[ModelResult]:
    """The report on the reference and the trials' models, all measured in one run, and `search.json`."""
    sign = 1 if COSTS[space.settings.cost] == "minimize" else -1
    points = [(sign * trial.values[1], -trial.values[0]) for trial in done]
    best = pareto_plot.front(points)
    bend = pareto_plot.knee([points[i] for i in best])
    knee = None if bend is None else best[bend]
    shown = list(range(len(done))) if len(done) < MOST_SHOWN else best[: MOST_SHOWN - 1]
    candidates: dict[str, Candidate] = {}
    for i in shown:
        reference, model = trial_models(space, done[i].params, workdir, console)
        candidates.setdefault(reference.name, reference)
        candidates.setdefault(model.name, model)
    rows = write_report(space.config, workdir, list(candidates.values()), console)
    trials = [
        {
            "values": trial.params,
            "quality": trial.values[0],
            space.settings.cost: trial.values[1],
            "on_front": i in best,
            "knee": i == knee,
            "model": trial.user_attrs["model"],
        }
        for i, trial in enumerate(done)
    ]
    stage.write_json(workdir / "search.json", {"cost": space.settings.cost, "trials": trials})
    console.print(document.table(rows))
    if knee is not None:
        console.print(f"knee of the front: {described(done[knee].params)}")
    console.print(f"report: {workdir / 'report.html'}")
    return rows
