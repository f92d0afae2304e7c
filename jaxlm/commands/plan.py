"""Asks the TPU compiler whether the training step of a config fits a slice, and what its chips send each other.

    jaxlm plan --config=configs/pretrain/gpt.py:1b --topology=v5e:4x4 \\
        --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.tensor=2 --config.train.batch_size=64

No TPU is needed: the compiler is the one that runs on the machines; `pip install "jax[tpu]"` brings it (in a clone,
`make plan-env` does). Prints gigabytes a chip against the chip's memory and the collectives by kind, and names every
parameter stack that is gathered whole. Exits with 1 when the step does not fit, or gathers a stack.
"""

import os
import sys

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import define_config


def define_flags() -> None:
    define_config()
    flags.DEFINE_string(
        "topology", None, "Generation and shape of the slice: v5e:4x4, v5p:4x4x8, v6e:4x4.", required=True
    )


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jaxlm.parallel.plan import plan
    from jaxlm.runner.config import mesh_shape
    from jaxlm.runner.dry_run import lower_step

    config = FLAGS.config
    try:
        step_plan = plan(lambda mesh: lower_step(config, mesh), FLAGS.topology, mesh_shape(config))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"plan: {error}")
    print(step_plan)
    sys.exit(0 if step_plan.fits and not step_plan.gathered else 1)
