"""From Python, without a config file: a stage, and a report on the models of several.

What passes from one call to the next is a model directory, as between the stages of a pipeline, and every keyword is a
section of a config (`default_config`), so that a run from Python and one from a file are the same run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from jaxlm.evaluate.benchmark import Candidate
from jaxlm.evaluate.comparison import ModelResult
from jaxlm.report import document
from jaxlm.runner import stage
from jaxlm.runner.config import default_config, overlay
from jaxlm.runner.pipeline import write_report


def run_stage(workdir: str | Path, **sections: Any) -> str:
    """Applies surgery, trains and measures as `jaxlm train` does, and returns the model directory.

    A run that was cut off goes on, a finished one is returned at once; `workdir/result.json` holds its metrics.

    Args:
      workdir: where the run lives.
      sections: of the config: `task`, `model`, `data`, `surgery`, `methods`, `losses`, `train`, …; fields that are left
        out keep their defaults, and without `train` nothing is trained.

    Raises:
      ValueError: for a field that does not exist (naming the nearest), or a `workdir` that holds another run.
    """
    stage.run(configured(sections), Path(workdir))
    return str(Path(workdir) / "model")


def compare(workdir: str | Path, models: Mapping[str, str | Path], **sections: Any) -> list[ModelResult]:
    """Measures models beside each other, prints the table, and writes the report that a pipeline writes.

    Args:
      workdir: where `report.html` and the other files go.
      models: model directories by name; all others are compared with the first.
      sections: of the config: `task`, `data`, `report`.

    Returns:
      a row a model: size, speed and quality, with all that they were computed from.

    Raises:
      ValueError: where there is nothing to measure on, or the models do not do the task.
    """
    config = configured(sections)
    first = next(iter(models))
    candidates = [
        Candidate(name, str(directory), Path(directory), reference=None if name == first else first)
        for name, directory in models.items()
    ]
    console = Console(stderr=True)
    rows = write_report(config, Path(workdir), candidates, console)
    console.print(document.table(rows))
    return rows


def configured(sections: Mapping[str, Any]) -> ConfigDict:
    """The default config with other values."""
    config = default_config()
    overlay(config, sections, "config")
    return config
