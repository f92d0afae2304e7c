"""The loop on a linear regression: what it skips, counts, names, saves, stops at and compiles."""

import dataclasses
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Loss, Method, Term, describe
from jaxlm.data.loader import Batches
from jaxlm.data.prefetch import prefetch
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.train.aot_compile import shape_of
from jaxlm.train.checkpointing import Stores
from jaxlm.train.gradient import gradient
from jaxlm.train.loop import Run, _not_finite, is_better, summarize, train
from jaxlm.train.metric_writer import MetricWriter, read_lines
from jaxlm.train.optimizer import optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import create_state, dropout_key, make_step

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 8, "batch_size": 4, "learning_rate": 0.1, "log_every": 2, "checkpoint_every": 4, "warmup": 0}


def batch(number: int, rows: int = 4) -> dict[str, np.ndarray]:
    x = np.random.default_rng(100 + number).normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}


def squared(params, constants, batch, ctx):
    error = batch["x"] @ params["dense"]["kernel"][:, 0] + params["dense"]["bias"] - batch["y"]
    return {"squared_error": Term(jnp.sum(error**2), jnp.float32(error.size))}, {}


@pytest.fixture
def start(tmp_path):
    """`start(make batch, evaluate, **settings)`: a run and its first state."""

    def make(make_batch=batch, evaluate=lambda state: {}, kinds=1, workdir=tmp_path, **changes):
        settings = TrainSettings(**(SETTINGS | changes))
        params = {"dense": {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(())}}
        infos = describe(params)
        tx = optimizer(settings, settings.steps, infos)
        step = make_step(
            gradient(Loss(squared), infos),
            tx,
            Method(),
            infos,
            ctx=Context(),
            largest_norm=settings.clip,
        )
        state = jax.jit(lambda params: create_state(dropout_key(0), params, {}, tx, infos))(params)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = lambda rows: (int(rows["x"].size), jax.device_put(rows, device))  # noqa: E731
        batches = Batches(make_batch, 100, kinds)
        recent = Checkpoints(workdir / "recent", settings.average_last + 1) if settings.average_last > 1 else None
        run = Run(
            settings=settings,
            steps=settings.steps,
            step=step,
            shardings=jax.tree.map(lambda _: device, state),
            constants={},
            shapes=[
                {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for n, a in make_batch(-1 - kind).items()}
                for kind in range(kinds)
            ],
            batches=lambda first, stop: prefetch(batches, first, stop, transform=place),
            evaluate=evaluate,
            stores=Stores(
                jax.eval_shape(lambda: state),
                Checkpoints(workdir / "checkpoints"),
                Checkpoints(workdir / "best"),
                recent,
            ),
            writer=MetricWriter(workdir, "run"),
        )
        return run, state

    return make


def go(run, state):
    with run.writer:
        try:
            return train(run, state)
        finally:
            run.stores.close()


def poisoned(*numbers):
    return lambda number: {n: np.where(number in numbers, np.float32(np.nan), a) for n, a in batch(number).items()}


def test_updates_that_are_not_finite_are_skipped_counted_and_named(start, capsys, tmp_path):
    state, progress = go(*start(poisoned(2, 3)))
    assert progress.skipped == 2 and int(state.step) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    told = capsys.readouterr().err
    assert (
        "step 3: gradient (or its squares' sum) not finite in dense/bias, dense/kernel; update skipped" in told
        and "step 4:" in told
    )
    lines = {line["step"]: line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")}
    assert lines[4] is None and all(lines[step] > 0 for step in (2, 6, 8))


def test_too_many_in_a_row_end_the_run(start, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"2 updates in a row .* step 3 in dense/bias, dense/kernel.*max_nonfinite"
    ):
        go(*start(poisoned(1, 2, 3), max_nonfinite=2))
    with pytest.raises(FloatingPointError, match=r"not one of the 8 updates was finite: nothing was learned"):
        go(*start(poisoned(*range(12)), max_nonfinite=99, workdir=tmp_path / "all"))
    _, progress = go(*start(poisoned(5, 7), max_nonfinite=2, workdir=tmp_path / "other"))  # a sound one between them
    assert progress.skipped == 2


def test_a_term_is_averaged_over_the_steps_that_had_it():
    """A batch without any label says nothing of the loss of labels."""
    log = {"nonfinite": 0, "gradient_norm": 1.0}
    labelled = log | {"terms": {"label": (6.0, 2.0, 0.5), "teacher": (4.0, 4.0, 1.0)}}
    without = log | {"terms": {"label": (0.0, 0.0, 0.5), "teacher": (12.0, 4.0, 1.0)}}
    assert summarize([labelled, without]) == {"loss": 3.5, "label": 3.0, "teacher": 2.0, "gradient_norm": 1.0}
    assert summarize([without]) == {"loss": 3.0, "label": 0.0, "teacher": 3.0, "gradient_norm": 1.0}


def test_a_log_leaves_skipped_steps_out(start, tmp_path):
    go(*start(poisoned(3), log_every=4))
    poisoned_losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert None not in poisoned_losses


def test_the_share_of_the_time_that_input_took_is_logged(start, tmp_path):
    def slow(number: int):
        time.sleep(0.1)
        return batch(number)

    _, progress = go(*start(slow))
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "train"]
    assert all(0 <= line["input_wait"] <= 1 for line in lines) and max(line["input_wait"] for line in lines) > 0.5
    assert 0.1 < progress.waited_seconds <= progress.seconds


def test_layers_are_named():
    name = "encoder/layers_4-6/mlp/up/kernel"
    assert _not_finite(name, np.array([True, False, True])) == ["encoder/layers_5/mlp/up/kernel"]
    assert _not_finite(name, np.array(False)) == [name]
    assert _not_finite(name, np.array(True)) == []


def test_each_shape_compiles_once_and_nothing_after_the_first_checkpoint(start, monkeypatch):
    steps: list[float] = []
    others: list[int] = []
    now = [0]

    def follow(feed, next_batch=prefetch.__next__):  # by the batch that the loop takes: others are made ahead
        now[0] += 1
        return next_batch(feed)

    monkeypatch.setattr(prefetch, "__next__", follow)

    def listen(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            steps.append(seconds) if threading.current_thread().name.startswith("compile") else others.append(now[0])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run, state = start(
            lambda number: batch(number, rows=(4, 2)[number % 2]), kinds=2, checkpoint_every=2, log_every=1
        )
        go(run, state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len({shape_of(shapes) for shapes in run.shapes}) == 2
    assert len(steps) == 2
    assert others and max(others) <= 2


@pytest.mark.parametrize(
    ("name", "values", "kept", "steps"),
    [
        ("loss", [3.0, 2.0, 2.5, 2.6, 1.0], 2, 4),
        ("accuracy", [0.1, 0.4, 0.4, 0.3, 0.9], 2, 4),
        ("loss", [float("nan"), 2.0, float("nan"), 1.0, 1.0], 4, 6),
        ("loss", [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3], 8, 8),
    ],
)
def test_the_best_is_kept_and_patience_ends(start, name, values, kept, steps):
    seen = {}

    def evaluate(state):
        seen[int(state.step)] = jax.device_get(state.params)
        return {name: values[len(seen) - 1] if len(seen) <= len(values) else 9.9}

    state, progress = go(*start(evaluate=evaluate, select=name, eval_every=1, patience=2))
    assert (progress.best_step, progress.steps) == (kept, steps)
    np.testing.assert_array_equal(state.params["dense"]["kernel"], seen[kept]["dense"]["kernel"])


def test_better():
    assert is_better("loss", 1.0, 2.0) and not is_better("loss", 2.0, 2.0) and is_better("f1", 2.0, 1.0)
    assert is_better("f1", 0.0, None) and not is_better("f1", float("nan"), None)


def test_select_must_be_a_metric(start):
    with pytest.raises(ValueError, match="select = 'f1', but the evaluation gives loss, accuracy"):
        go(*start(evaluate=lambda state: {"loss": 1.0, "accuracy": 0.0}, select="f1"))


def test_a_trail_of_regular_checkpoints(start):
    run, state = start(average_last=2, checkpoint_every=3)
    go(run, state)
    assert run.stores.recent.steps() == [3, 6, 8]
    assert run.stores.latest.steps() == [6, 8]


@pytest.mark.full
def test_a_profile_of_the_chosen_steps(start, tmp_path):
    go(*start(profile_from=3, profile_steps=2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_full_disk_ends_the_run(start, monkeypatch):
    run, state = start()

    def full(*_):
        raise OSError(28, "No space left on device", str(run.writer.path))

    monkeypatch.setattr(run.stores.latest, "save", full)
    with pytest.raises(OSError, match="No space left"):
        go(run, state)


def test_progress_is_json(start):
    run, state = start()
    _, progress = go(run, state)
    assert json.loads(json.dumps(dataclasses.asdict(progress)))["steps"] == 8
    assert progress.tokens == 8 * 12 and progress.seconds > 0 and progress.compile_seconds > 0
