"""What a run writes while it goes on: `metrics.jsonl`, TensorBoard, and the console."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The sound lines of a jsonl file; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Journal:
    """Writes scalars of a run; `rewind` first drops what a resumed run is going to write again."""

    def __init__(self, workdir: Path, name: str):
        self.path = workdir / "metrics.jsonl"
        self.console = Console(file=sys.stderr)
        self.folder = workdir / "tensorboard"
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
        self.bar = self.progress.add_task(name, total=None, status="compiling")
        self.name, self.steps = name, 0

    def expect(self, steps: int) -> None:
        """Sets the number of steps, once it is known."""
        self.steps = steps
        self.progress.update(self.bar, total=steps)

    def rewind(self, step: int) -> None:
        """Keeps the lines up to `step`, where the run goes on."""
        lines = [line for line in read_lines(self.path) if line["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
        self.progress.update(self.bar, completed=step)

    def __enter__(self) -> "Journal":
        from tensorboardX import SummaryWriter

        self.tensorboard = SummaryWriter(str(self.folder))
        self.progress.start()
        self.file = self.path.open("a", encoding="utf8")
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        self.file.close()
        self.tensorboard.close()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self.progress.update(self.bar, completed=step)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line of scalars; `split` is `train`, `eval` or `test`."""
        line = {"step": step, "split": split, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.tensorboard.add_scalar(f"{split}/{key}", value, step)
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        if split == "train":
            status = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tok/s"
            self.progress.update(self.bar, status=status)
        if split != "train" or not self.console.is_terminal:
            self.console.print(f"{self.name} {step}/{self.steps} {split}: {shown}", highlight=False)

    def say(self, text: str) -> None:
        """A notice to the person at the console."""
        self.console.print(text, highlight=False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
