"""The writer: one line a step and split, also after a run was cut off; readable with and without a terminal."""

import io
import json
import re

import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2  # noqa: F401  (fails here if TensorBoard files could not be written)

from jaxlm.train import metric_writer as module
from jaxlm.train.metric_writer import MetricWriter, read_lines

VALUES = {"loss": 1.5, "gradient_norm": 2.0, "tokens_per_second": 1234.5}


def record(workdir, first: int, last: int, last_eval_step: int = 0) -> None:
    with MetricWriter(workdir, "run") as writer:
        writer.begin(first, 9, last_eval_step)
        for step in range(first + 1, last + 1):
            writer.write(step, "train", VALUES)
            if step % 2 == 0:
                writer.write(step, "eval", {"loss": 0.5})


def keys(workdir) -> list[tuple[int, str]]:
    return [(line["step"], line["split"]) for line in read_lines(workdir / "metrics.jsonl")]


def test_a_resumed_run_repeats_no_line(tmp_path):
    record(tmp_path, 0, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "spl')  # the process was killed here
    record(tmp_path, 4, 9, last_eval_step=4)
    whole = tmp_path / "whole"
    record(whole, 0, 9)
    assert keys(tmp_path) == keys(whole)


def test_an_evaluation_that_is_made_up_for_is_written_once(tmp_path):
    record(tmp_path, 0, 4)
    with MetricWriter(tmp_path, "run") as writer:
        writer.begin(4, 9, last_eval_step=2)
        writer.write(4, "eval", {"loss": 0.5})
    assert keys(tmp_path) == [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train"), (4, "eval")]


def test_what_is_not_finite_is_null(tmp_path):
    with MetricWriter(tmp_path, "run") as writer:
        writer.begin(0, 9, 0)
        writer.write(1, "train", VALUES | {"loss": float("nan")})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["gradient_norm"] == 2.0


def test_lines_without_a_terminal_are_not_wrapped(tmp_path, capsys):
    with MetricWriter(tmp_path, "run") as writer:
        writer.begin(0, 9, 0)
        writer.write(1, "eval", {f"a long name of a metric {i}": 0.5 for i in range(9)})
        writer.info("a path " + 200 * "x" + " [not markup]")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("run 1/9 eval: a long name") and lines[1].endswith("x [not markup]")


def test_a_terminal_shows_progress_speed_and_loss(tmp_path, monkeypatch):
    screen = io.StringIO()
    console = lambda **_: Console(file=screen, force_terminal=True, width=120)  # noqa: E731
    monkeypatch.setattr(module, "Console", console)
    read = lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())  # noqa: E731
    with MetricWriter(tmp_path, "run") as writer:
        writer.begin(0, 9, 0)
        writer.advance(1, {"terms": {"a": (6.0, 2.0, 0.5), "b": (1.0, 1.0, 1.0)}}, 1234.0)
        writer.progress.refresh()
        assert "1/9 loss 2.5000  1,234 tokens/s" in read() and "left" in read()
        writer.write(2, "train", VALUES)
        writer.progress.refresh()
        assert "2/9 loss 1.5000" in read()
    assert "run 2/9 train" not in read()  # the bar says it


def test_other_processes_are_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    record(tmp_path / "run", 0, 3)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")
