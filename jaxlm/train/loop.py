"""The training loop. It reads from top to bottom: restore, step, log, evaluate, save, choose."""

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.core import SEGMENT
from jaxlm.train.aot_compile import compiled
from jaxlm.train.checkpointing import Progress, Stores
from jaxlm.train.metric_writer import MetricWriter
from jaxlm.train.preemption import Interrupted, PreemptionFlag
from jaxlm.train.profiler import Profile
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})
IN_FLIGHT = 2
"""Steps that are handed to the device before an earlier one is done: enough to keep it busy, few enough to hold back
neither the progress bar nor a signal."""


class Feed(Protocol):
    """Batches on the devices with their numbers of tokens; `waited` counts the seconds spent waiting for them."""

    waited: float

    def __next__(self) -> tuple[int, dict[str, jax.Array]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """Everything the loop needs, as functions and arrays.

    Attributes:
      settings: `config.train`; steps: updates in all.
      step: `(state, constants, batch) -> (state, log)`, not compiled yet.
      shardings: of the state, a tree like it.
      constants: teacher and the like, on the devices.
      shapes: `{name: ShapeDtypeStruct}` of every batch that will come.
      batches: `(start, stop)` to the feed of those steps.
      evaluate: `(state) -> metrics`.
      stores: where checkpoints go.
      writer: where scalars go.
    """

    settings: TrainSettings
    steps: int
    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    shardings: Any
    constants: dict[str, Any]
    shapes: list[dict[str, jax.ShapeDtypeStruct]]
    batches: Callable[[int, int], Feed]
    evaluate: Callable[[TrainState], dict[str, float]]
    stores: Stores
    writer: MetricWriter

    def logs(self, number: int) -> bool:
        """Whether scalars are written after this step."""
        return number == self.steps or _is_due(self.settings.log_every, number)

    def saves(self, number: int) -> bool:
        """Whether a checkpoint follows this step, whatever happens."""
        return number == self.steps or _is_due(self.settings.checkpoint_every, number)

    def evaluates(self, number: int) -> bool:
        """Whether an evaluation follows this step."""
        last = number == self.steps and bool(self.settings.select)
        return last or _is_due(self.settings.eval_every, number)


def train(run: Run, state: TrainState) -> tuple[TrainState, Progress]:
    """Trains `state` to `run.steps` and returns the parameters to keep, with what is known of the run.

    Raises:
      Interrupted: after a signal, once the state is saved.
      FloatingPointError: after `max_nonfinite` consecutive updates that were not finite, naming the arrays, or at the
        end where none was.
    """
    settings, writer = run.settings, run.writer
    resumed = run.stores.resume(state, run.shardings)
    state, progress = resumed or (state, Progress())
    start = int(state.step)
    if resumed:
        writer.info(f"resumed from step {start}")
    stopped = start == run.steps or progress.should_stop(settings)

    writer.begin(start, run.steps, progress.last_eval_step)
    if run.evaluates(start) and progress.last_eval_step < start:  # it was interrupted between step and evaluation
        evaluate_and_track(run, state, start, progress)
        stopped = stopped or progress.should_stop(settings)
    with (
        contextlib.closing(run.batches(start, start if stopped else run.steps)) as batches,
        contextlib.closing(compiled(run.step, run.shardings, state, run.constants, run.shapes)) as steps,
        PreemptionFlag() as interruption,
        Profile(writer.path.parent / "profile", settings.profile_from, settings.profile_steps) as profile,
    ):
        pending: list[tuple[int, dict[str, Any]]] = []
        tokens, began = 0, time.perf_counter()
        for number in range(start + 1, start if stopped else run.steps + 1):
            count, batch = next(batches)
            profile.at(number, state)
            if pending and not steps.ready(batch):
                jax.block_until_ready(pending[-1][1])  # which is training's time, not the compiler's
            asked = time.perf_counter()
            step = steps.of(batch)
            compiling = time.perf_counter() - asked
            progress.compile_seconds, began = progress.compile_seconds + compiling, began + compiling
            state, log = step(state, run.constants, batch)
            pending.append((number, log))
            tokens += count
            if len(pending) > IN_FLIGHT:
                done, log = pending[-1 - IN_FLIGHT]
                jax.block_until_ready(log)
                writer.advance(done, log, tokens / (time.perf_counter() - began))

            interrupted = interruption.at(number)
            if not (interrupted or run.logs(number) or run.saves(number) or run.evaluates(number)):
                continue
            steps.check()
            logs = jax.device_get([log for _, log in pending])
            elapsed = time.perf_counter() - began
            progress.steps = number
            progress.tokens, progress.seconds = progress.tokens + tokens, progress.seconds + elapsed
            waited, batches.waited = batches.waited, 0.0
            progress.waited_seconds += waited
            progress.skipped += sum(bool(log["nonfinite"]) for log in logs)
            progress.metrics["train"] = summarize(logs)
            pace = {"tokens_per_second": tokens / elapsed, "input_wait": waited / elapsed}
            writer.write(number, "train", progress.metrics["train"] | pace)
            report_nonfinite(logs, [n for n, _ in pending], settings, writer)
            pending, tokens = [], 0

            if (
                run.evaluates(number) and not interrupted
            ):  # there may be no time left; the run that resumes makes up for it
                evaluate_and_track(run, state, number, progress)
            stopped = number == run.steps or progress.should_stop(settings)
            if run.stores.recent and run.saves(number):
                run.stores.save_model(run.stores.recent, number, state)
            if run.saves(number) or interrupted or stopped or progress.best_step == number:
                run.stores.save(number, state, progress)
            if interrupted:
                run.stores.latest.wait()
                writer.info(f"interrupted: step {number} is saved, and the same command goes on from there")
                raise Interrupted(143)
            if stopped:
                break
            began = time.perf_counter()
    if state.step and int(state.nonfinite) == int(state.step):
        raise FloatingPointError(
            f"not one of the {int(state.step)} updates was finite: nothing was learned. Look at the parameters that "
            "the run starts from and at its data, or lower config.train.learning_rate"
        )
    run.stores.latest.wait()
    return choose(run, state, progress), progress


def _is_due(every: int, number: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and number > 0 and number % every == 0


def summarize(logs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over several steps, less those that were skipped: the loss, each of several terms, the gradient norm.

    A term is averaged over the steps that had it: a batch may be without any label.
    """
    logs = [log for log in logs if not log["nonfinite"]] or logs
    terms: dict[str, float] = {}
    total = 0.0
    for name in logs[0]["terms"]:
        sums = [log["terms"][name] for log in logs]
        means = [(float(s) / float(w), float(c)) for s, w, c in sums if w != 0]
        terms[name] = float(np.mean([mean for mean, _ in means])) if means else 0.0
        total += float(np.mean([c * mean for mean, c in means])) if means else 0.0
    values = {"loss": total} | (terms if len(terms) > 1 else {})
    return values | {"gradient_norm": float(np.mean([log["gradient_norm"] for log in logs]))}


def report_nonfinite(logs: list[dict], numbers: list[int], settings: TrainSettings, writer: MetricWriter) -> None:
    """Names the arrays whose gradient was not finite; ends the run after too many in a row."""
    for number, log in zip(numbers, logs, strict=True):
        count = int(log["nonfinite"])
        if not count:
            continue
        bad = [name for array, finite in log["finite"].items() for name in _not_finite(array, finite)]
        named = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "") or "all arrays together"
        writer.info(f"step {number}: gradient (or its squares' sum) not finite in {named}; update skipped")
        if count >= settings.max_nonfinite:
            raise FloatingPointError(
                f"{count} updates in a row were not finite, the last at step {number} in {named}; lower "
                f"config.train.learning_rate, look at the data of that step, or allow more with "
                f"config.train.max_nonfinite"
            )


def _not_finite(name: str, finite: np.ndarray) -> list[str]:
    """Names of what is not finite in an array: its own, or where every layer was looked at apart, those of layers.

    >>> _not_finite("layers_4-6/mlp/up/kernel", np.array([True, False, True]))
    ['layers_5/mlp/up/kernel']
    """
    if np.ndim(finite) == 0:
        return [] if finite else [name]
    segment = re.search(SEGMENT, name)
    first = int(segment[1]) if segment else 0
    return [re.sub(SEGMENT, f"layers_{first + i}", name) for i in np.flatnonzero(~np.asarray(finite))]


def evaluate_and_track(run: Run, state: TrainState, number: int, progress: Progress) -> None:
    """Evaluates, and keeps the best parameters."""
    metrics, name = run.evaluate(state), run.settings.select
    progress.last_eval_step = number
    if not metrics:
        return
    progress.metrics["eval"] = metrics
    run.writer.write(number, "eval", metrics)
    if not name:
        return
    if name not in metrics:
        raise ValueError(f"config.train.select = {name!r}, but the evaluation gives {', '.join(metrics)}")
    if is_better(name, metrics[name], progress.best_value):
        progress.best_value, progress.best_step, progress.evals_since_best = metrics[name], number, 0
        run.stores.save_model(run.stores.best, number, state)
    else:
        progress.evals_since_best += 1


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a metric improves on the best so far; what is not a number never does."""
    if math.isnan(value) or best is None:
        return not math.isnan(value)
    return value < best if name in LOWER_IS_BETTER else value > best


def choose(run: Run, state: TrainState, progress: Progress) -> TrainState:
    """The parameters to keep: those of the best evaluation where one is selected, else the last."""
    if not run.settings.select or progress.best_step in (0, int(state.step)):
        return state
    best = run.stores.restore_model(run.stores.best, progress.best_step, state, run.shardings)
    run.writer.info(f"kept step {progress.best_step}: {run.settings.select} {progress.best_value:.4f}")
    return best
