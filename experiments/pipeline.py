"""Runs the stages of a config in order, each once, and writes a report over all of their models.

    python experiments/pipeline.py --config=configs/quickstart.py --workdir=runs/quickstart

When re-run, the command skips what is finished and goes on with what is not. A stage runs again when its config, the
code or a model that it starts from changed.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxlm.runner.cli import run, start

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a Python file with get_config() and stages.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where stages and report live.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    from jaxlm.runner import pipeline

    start()
    pipeline.run(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    run(main)
