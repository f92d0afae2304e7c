"""A run that can start: methods, loss, gradient, optimizer and data of a setup, joined."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax

from jaxlm.core import Method, MethodInit, arrays, chain
from jaxlm.data.prefetch import prefetch
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.io.lm import LM
from jaxlm.parallel import shard_tree, unpad_vocab
from jaxlm.parallel.batches import batch_shapes, to_devices
from jaxlm.runner import registry
from jaxlm.runner.run_setup import RunSetup, split_evaluator
from jaxlm.runner.sharded_step import ShardedStep, sharded_step
from jaxlm.runner.teachers import distillation_losses, training_batches
from jaxlm.train.checkpointing import Stores
from jaxlm.train.loop import Run
from jaxlm.train.metric_writer import MetricWriter
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, dropout_key


class TrainerInputs(NamedTuple):
    """What `train` begins with, and what its end is read with.

    Attributes:
      run: the loop's functions; its step is not compiled yet.
      state: before the first step, on the devices.
      method: the chain of the run's methods.
      lm: the model as the methods made it, with what they added.
      facts: what `result.json` says of what was prepared.
    """

    run: Run
    state: TrainState
    method: Method
    lm: LM
    facts: dict[str, Any]


def build_trainer(setup: RunSetup, workdir: Path, writer: MetricWriter) -> TrainerInputs:
    """Methods, loss, gradient, optimizer and data of `setup`, joined into a Run."""
    check_training(setup)
    batches, steps = training_batches(setup)
    check_profile(setup.training, steps)
    distillation = distillation_losses(setup, batches, steps, writer.info)
    batches = distillation.batches
    method = chain([*map(registry.method, setup.config["methods"]), *distillation.methods])
    start = method.init(setup.key("methods"), setup.lm)
    plan = sharded_step(setup, method, start, steps)
    create = jax.jit(plan.create, out_shardings=plan.placement)
    params = shard_tree(plan.params, arrays(plan.placement.params))
    state = create(dropout_key(setup.config["seed"]), params, jax.device_put(start.state, plan.placement.method))
    to_device = to_devices(setup.mesh, setup.rules)
    run = Run(
        settings=setup.training,
        steps=steps,
        step=plan.step,
        shardings=plan.placement,
        constants=start.constants,
        shapes=batch_shapes(batches, to_device),
        batches=lambda start, stop: prefetch(batches, start, stop, transform=to_device),
        evaluate=evaluation_of(setup, method),
        stores=stores_in(workdir, setup.training, saved_shapes(plan, start)),
        writer=writer,
    )
    return TrainerInputs(run, state, method, cast(LM, start.lm), distillation.facts)


def check_training(setup: RunSetup) -> None:
    """Raises ValueError where training needs a split that the config lacks, or averages what is not to be baked."""
    select = setup.training.select
    if "train" not in setup.splits:
        raise ValueError("config.data.train is empty; name a file, a glob or a tfds split to train on")
    if setup.training.average_last > 1 and setup.config["methods"] and not setup.config["bake"]:
        raise ValueError(
            f"config.train.average_last = {setup.training.average_last}: what is averaged are baked models, since a "
            "mean of factors or masks is no mean of what they stand for; set config.bake, or average nothing"
        )
    if select and "eval" not in setup.splits:
        raise ValueError(f"config.train.select = {select!r} needs config.data.eval, the data to evaluate on")


def check_profile(training: TrainSettings, steps: int) -> None:
    """Raises ValueError for steps to profile that the run does not have."""
    if training.profile_steps and training.profile_from > steps:
        raise ValueError(f"config.train.profile_from = {training.profile_from}: the run has only {steps} steps")


def evaluation_of(setup: RunSetup, method: Method) -> Callable[[TrainState], dict[str, float]]:
    """`state -> metrics` on the eval split; none without one."""
    score = split_evaluator(setup, setup.lm.network, "eval")

    def evaluate(state: TrainState) -> dict[str, float]:
        return score(method.eval_params(state.params, state.method)).metrics if score else {}

    return evaluate


def saved_shapes(plan: ShardedStep, start: MethodInit) -> TrainState:
    """Shapes of the state with the vocabulary as long as it is, whatever multiple the mesh wants."""
    params = unpad_vocab(jax.eval_shape(lambda: plan.params), start.lm.axes, start.lm.config.vocab_size)
    return jax.eval_shape(plan.create, dropout_key(0), params, start.state)


def stores_in(workdir: Path, training: TrainSettings, shapes: TrainState) -> Stores:
    """Where a run keeps its checkpoints."""
    averaged = training.average_last
    return Stores(
        shapes,
        latest=Checkpoints(workdir / "checkpoints", keep=training.keep),
        best=Checkpoints(workdir / "best", keep=2),
        recent=Checkpoints(workdir / "recent", keep=averaged + 1) if averaged > 1 else None,
    )
