"""The setup of a run without data or config, for tests that take its steps themselves."""

import jax

from jaxlm.data.settings import DataSettings
from jaxlm.io.lm import LM
from jaxlm.parallel import make_mesh, make_rules
from jaxlm.runner.run_setup import RunSetup
from jaxlm.tasks import TASKS
from jaxlm.train.settings import TrainSettings


def one_device_setup(lm: LM, task: str, training: TrainSettings) -> RunSetup:
    """What a run of `task` works on, on one device, where the batches come from the test."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return RunSetup(
        config={},
        data=DataSettings(),
        training=training,
        task=TASKS[task],
        lm=lm,
        splits={},
        mesh=mesh,
        rules=make_rules({}, lm.axes, mesh),
    )
