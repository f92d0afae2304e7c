"""What a run writes while it goes on: `metrics.jsonl`, TensorBoard, and the console."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH = 0.5
"""Seconds between two looks at a running step for the progress bar."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The sound lines of a jsonl file; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class MetricWriter:
    """Writes scalars of a run, once `begin` has dropped what a resumed run is going to write again.

    On a terminal a progress bar shows the newest, elsewhere every line is printed. Of several processes only the first
    one writes and speaks.
    """

    def __init__(self, workdir: Path, name: str):
        self.writes = jax.process_index() == 0
        self.path, self.name, self.steps = workdir / "metrics.jsonl", name, 0
        self.console = Console(file=sys.stderr, quiet=not self.writes, soft_wrap=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(name, total=None, status="preparing")
        self.shown = 0.0
        self.file: Any = None
        self.tensorboard: Any = None

    def __enter__(self) -> "MetricWriter":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if self.file is not None:
            self.file.close()
            self.tensorboard.close()

    def begin(self, step: int, steps: int, last_eval_step: int) -> None:
        """Opens the files for a run of `steps` steps that goes on after `step`, last evaluated at `last_eval_step`.

        Lines that it is going to write again are dropped.
        """
        self.steps = steps
        self.progress.reset(self.bar, completed=step, total=steps, status="")
        if not self.writes:
            return
        from tensorboardX import SummaryWriter

        self.path.parent.mkdir(parents=True, exist_ok=True)
        last = {"train": step, "eval": last_eval_step}
        lines = [line for line in read_lines(self.path) if line["step"] <= last[line["split"]]]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
        part.replace(self.path)
        self.file = self.path.open("a", encoding="utf8")
        self.tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def advance(self, step: int, log: Mapping[str, Any], tokens_per_second: float) -> None:
        """Moves the bar to a step that is done; its log is looked at twice a second."""
        self.progress.update(self.bar, completed=step)
        if self.console.is_terminal and time.monotonic() - self.shown > REFRESH:
            self.shown = time.monotonic()
            loss = sum(float(c * s) / max(float(w), 1e-9) for s, w, c in jax.device_get(log["terms"]).values())
            self._show(step, loss, tokens_per_second)

    def _show(self, step: int, loss: float, tokens_per_second: float) -> None:
        status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.bar, completed=step, status=status)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line of scalars; `split` is `train` or `eval`. What is not finite is written as null."""
        if self.writes:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            line = {"step": step, "split": split, "time": round(time.time(), 3)} | dict.fromkeys(values) | finite
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for key, value in finite.items():
                self.tensorboard.add_scalar(f"{split}/{key}", value, step)
        if split == "train":
            self._show(step, values["loss"], values["tokens_per_second"])
        if split != "train" or not self.console.is_terminal:
            shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
            self.info(f"{self.name} {step}/{self.steps} {split}: {shown}")

    def info(self, text: str) -> None:
        """A notice to the person at the console."""
        self.console.print(text, highlight=False, markup=False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
