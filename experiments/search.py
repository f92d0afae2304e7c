"""Sweeps the strength of a pipeline's methods, and reports the Pareto front of quality against cost, with its knee.

    python experiments/search.py --config=configs/search.py --workdir=runs/search

What is varied stands in `config.search`. When re-run, the command goes on where it was; stages that trials have in
common are done once. `workdir/report.html` compares all that was reached, `workdir/search.json` holds every trial.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxlm.runner.cli import run, start

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a Python file with get_config() and stages.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where study, stages and report live.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    from jaxlm.runner import search

    start()
    search.run(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    run(main)
