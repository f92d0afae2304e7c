"""Runs the stages of a config in order, each once, and writes a report over all of their models.

    jaxlm pipeline --config=configs/quickstart.py --workdir=runs/quickstart

When re-run, the command skips what is finished and goes on with what is not. A stage runs again when its config, the
code or a model that it starts from changed.
"""

from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import define_config, start


def define_flags() -> None:
    define_config("The recipe, a Python file with get_config() and stages.")
    flags.DEFINE_string("workdir", None, "Where stages and report live.", required=True)


def main() -> None:
    from jaxlm.runner import pipeline

    start()
    pipeline.run(FLAGS.config, Path(FLAGS.workdir))
