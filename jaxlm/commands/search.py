"""Sweeps the strength of a pipeline's methods, and reports the Pareto front of quality against cost, with its knee.

    jaxlm search --config=configs/search.py --workdir=runs/search

What is varied stands in `config.search`. When re-run, the command goes on where it was; stages that trials have in
common are done once. `workdir/report.html` compares all that was reached, `workdir/search.json` holds every trial.
"""

from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import define_config, start


def define_flags() -> None:
    define_config("The recipe, a Python file with get_config() and stages.")
    flags.DEFINE_string("workdir", None, "Where study, stages and report live.", required=True)


def main() -> None:
    from jaxlm.runner import search

    start()
    search.run(FLAGS.config, Path(FLAGS.workdir))
