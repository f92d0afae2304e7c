"""Asks the TPU compiler whether the training step of a config fits a slice, and what its chips send each other.

    make plan-env
    .venv-plan/bin/python experiments/plan.py --config=configs/pretrain/gpt.py:1b --topology=v5e:4x4 \\
        --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.tensor=2 --config.train.batch_size=64

No TPU is needed: the compiler is the one that runs on the machines. Prints gigabytes a chip against the chip's memory
and the collectives by kind, and names every parameter stack that is gathered whole. Exits with 1 when the step does not
fit, or gathers a stack.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from absl import flags
from ml_collections import config_flags

from jaxlm.runner.cli import run

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a Python file with get_config().")
TOPOLOGY = flags.DEFINE_string("topology", None, "Generation and shape of the slice: v5e:4x4, v5p:4x4x8, v6e:4x4.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    from jaxlm.parallel.plan import plan
    from jaxlm.runner.config import mesh_shape
    from jaxlm.runner.dry_run import lower_step

    try:
        step_plan = plan(lambda mesh: lower_step(CONFIG.value, mesh), TOPOLOGY.value, mesh_shape(CONFIG.value))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"plan: {error}")
    print(step_plan)
    sys.exit(0 if step_plan.fits and not step_plan.gathered else 1)


if __name__ == "__main__":
    run(main)
