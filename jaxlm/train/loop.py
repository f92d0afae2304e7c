"""The training loop. It reads from top to bottom: restore, compile, step, log, evaluate, save, choose."""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.train.journal import Journal
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})
Shape = tuple[tuple[str, tuple[int, ...]], ...]


class Feed(Protocol):
    """Batches on the devices with their numbers of tokens; `waited` counts the seconds spent waiting for them."""

    waited: float

    def __next__(self) -> tuple[int, dict[str, jax.Array]]: ...
    def close(self) -> None: ...


class Store(Protocol):
    """Where checkpoints go: flat `{name: array}` with JSON metadata, by step."""

    def save(self, step: int, state: dict[str, jax.Array], metadata: dict) -> None: ...
    def restore(
        self, target: dict[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> tuple[int, dict[str, jax.Array], dict] | None: ...
    def steps(self) -> list[int]: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """Everything the loop needs, as functions and arrays.

    Attributes:
      settings: `config.train`; steps: updates in all.
      step: `(state, constants, batch) -> (state, log)`, not compiled yet.
      shardings: of the state, a tree like it.
      constants: teacher and the like, on the devices.
      shapes: `{name: ShapeDtypeStruct}` of every batch that will come; all are compiled before the first step.
      batches: `(start, stop)` to the feed of those steps.
      evaluate: `(state) -> metrics`.
      store, best: checkpoints of the run, and of its best evaluation.
      journal: where scalars go.
    """

    settings: TrainSettings
    steps: int
    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    shardings: Any
    constants: dict[str, Any]
    shapes: list[dict[str, jax.ShapeDtypeStruct]]
    batches: Callable[[int, int], Feed]
    evaluate: Callable[[TrainState], dict[str, float]]
    store: Store
    best: Store
    journal: Journal


@dataclass
class Progress:
    """What a run knows besides its arrays; saved with every checkpoint."""

    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    waited_seconds: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    worse: int = 0
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came; the state is saved. Exit code 143."""


def flatten_state(state: Any) -> dict[str, Any]:
    """`{path: array}` of any tree, by jax's own path strings."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def unflatten_state(template: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `flatten_state`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[jax.tree_util.keystr(path)], template)


def shape_of(batch: Mapping[str, Any]) -> Shape:
    """What distinguishes one compiled step from another."""
    return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))


def restore(store: Store, state: TrainState, shardings: Any) -> tuple[TrainState, Progress] | None:
    """The newest sound checkpoint in the shape and placement of `state`, or `None`."""
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    found = store.restore(flatten_state(target))
    if found is None:
        return None
    _, arrays, metadata = found
    return unflatten_state(state, arrays), Progress(**metadata["progress"])


def train(run: Run, state: TrainState) -> tuple[TrainState, Progress]:
    """Trains `state` to `run.steps` and returns the parameters to keep, with what is known of the run.

    Raises:
      Interrupted: after a signal, once the state is saved.
      FloatingPointError: after `max_nonfinite` consecutive updates that were not finite, naming the arrays.
    """
    settings, journal = run.settings, run.journal
    progress = Progress()
    resumed = restore(run.store, state, run.shardings)
    if resumed is not None:
        state, progress = resumed
        journal.say(f"resumed from step {int(state.step)}")
    start = int(state.step)
    journal.rewind(start)

    began = time.perf_counter()
    steps = compile_all(run, state) if start < run.steps else {}
    progress.compile_seconds += time.perf_counter() - began

    with Interruption() as interruption, Profile(settings, journal) as profile:
        batches = run.batches(start, run.steps)
        pending: list[tuple[int, dict[str, Any]]] = []
        tokens, began, stop_early = 0, time.perf_counter(), False
        for number in range(start + 1, run.steps + 1):
            count, batch = next(batches)
            profile.at(number)
            state, log = steps[shape_of(batch)](state, run.constants, batch)
            pending.append((number, log))
            tokens += count
            journal.advance(number)

            last = number == run.steps
            logging, assessing, saving = (
                last or (every > 0 and number % every == 0)
                for every in (settings.log_every, settings.eval_every, settings.checkpoint_every)
            )
            if not (logging or assessing or saving or interruption.came):
                continue
            logs = jax.device_get([log for _, log in pending])
            elapsed = time.perf_counter() - began
            progress.tokens, progress.seconds = progress.tokens + tokens, progress.seconds + elapsed
            progress.waited_seconds += batches.waited
            batches.waited = 0.0
            progress.skipped += sum(bool(log["nonfinite"]) for log in logs)
            journal.write(number, "train", summarize(logs) | {"tokens_per_second": tokens / elapsed})
            report_nonfinite(logs, [n for n, _ in pending], settings, journal)
            pending, tokens = [], 0

            if assessing and not interruption.came:
                stop_early = assess(run, state, number, progress)
            if (saving or stop_early or interruption.came) and not last:
                run.store.save(number, flatten_state(state), {"progress": vars(progress)})
            if interruption.came:
                run.store.wait()
                raise Interrupted(143)
            if last or stop_early:
                run.store.save(number, flatten_state(state), {"progress": vars(progress)})
                break
            began = time.perf_counter()
        batches.close()
    run.store.wait()
    return choose(run, state, progress), progress


def compile_all(run: Run, state: TrainState) -> dict[Shape, Callable]:
    """One executable a batch shape. An executable cannot recompile, so nothing compiles after this."""
    jitted = jax.jit(run.step, donate_argnums=0, out_shardings=(run.shardings, None))
    return {shape_of(batch): jitted.lower(state, run.constants, batch).compile() for batch in run.shapes}


def summarize(logs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over several steps: the loss, each term where there are several, and the gradient norm."""
    terms: dict[str, float] = {}
    total = 0.0
    for name in logs[0]["terms"]:
        sums = [log["terms"][name] for log in logs]
        means = [float(s) / max(float(w), 1e-9) for s, w, _ in sums]
        terms[name] = float(np.mean(means))
        total += float(np.mean([c * m for (_, _, c), m in zip(sums, means, strict=True)]))
    values = {"loss": total} | (terms if len(terms) > 1 else {})
    return values | {"gradient_norm": float(np.mean([log["gradient_norm"] for log in logs]))}


def report_nonfinite(logs: list[dict], numbers: list[int], settings: TrainSettings, journal: Journal) -> None:
    """Names the arrays whose gradient was not finite; ends the run after too many in a row."""
    for number, log in zip(numbers, logs, strict=True):
        count = int(log["nonfinite"])
        if not count:
            continue
        bad = [name for name, finite in log["finite"].items() if not finite]
        named = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        journal.say(f"step {number}: gradient not finite in {named or 'the norm alone'}; update skipped")
        if count >= settings.max_nonfinite:
            raise FloatingPointError(
                f"{count} updates in a row were not finite, at step {number} in {named}; lower "
                f"config.train.learning_rate, or allow more with config.train.max_nonfinite"
            )


def assess(run: Run, state: TrainState, number: int, progress: Progress) -> bool:
    """Evaluates, keeps the best parameters, and says whether to stop early."""
    progress.metrics = run.evaluate(state)
    run.journal.write(number, "eval", progress.metrics)
    name = run.settings.select
    if not name:
        return False
    if name not in progress.metrics:
        raise ValueError(f"config.train.select = {name!r}, but the evaluation gives {', '.join(progress.metrics)}")
    value = progress.metrics[name]
    better = progress.best_value is None or (
        value < progress.best_value if name in LOWER_IS_BETTER else value > progress.best_value
    )
    if better:
        progress.best_value, progress.best_step, progress.worse = value, number, 0
        run.best.save(number, flatten_state(state), {"progress": vars(progress)})
    else:
        progress.worse += 1
    return bool(run.settings.patience) and progress.worse >= run.settings.patience


def choose(run: Run, state: TrainState, progress: Progress) -> TrainState:
    """The parameters to keep: those of the best evaluation where one is selected, else the last."""
    if not run.settings.select or progress.best_step == int(state.step) or progress.best_value is None:
        return state
    run.best.wait()
    found = restore(run.best, state, run.shardings)
    if found is None:
        return state
    run.journal.say(f"kept step {progress.best_step}: {run.settings.select} {progress.best_value:.4f}")
    return found[0]


class Interruption:
    """Turns SIGTERM and SIGINT into a flag while training, so that a step is never cut in two."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> "Interruption":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.came = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Profile:
    """Traces the chosen steps for TensorBoard's profiler."""

    def __init__(self, settings: TrainSettings, journal: Journal) -> None:
        self.first, self.steps = settings.profile_from, settings.profile_steps
        self.path, self.open = str(journal.path.parent / "profile"), False

    def at(self, number: int) -> None:
        if self.steps and number == self.first:
            jax.profiler.start_trace(self.path)
            self.open = True
        if self.open and number == self.first + self.steps:
            self.__exit__()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.open:
            jax.profiler.stop_trace()
            self.open = False
