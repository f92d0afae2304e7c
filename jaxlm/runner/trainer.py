"""Methods, loss, gradient, optimizer and data of a setting, joined into a run that can start."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.core import (
    Adapted,
    Axes,
    Method,
    arrays,
    chain,
)
from jaxlm.data.prefetch import prefetch
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.parallel import shard_tree, unpad_vocab
from jaxlm.parallel.batches import batch_shapes, to_devices
from jaxlm.runner import registry
from jaxlm.runner.run_setup import Setting, split_evaluator
from jaxlm.runner.sharded_step import ShardedStep, blueprint
from jaxlm.runner.teachers import losses_of, training_batches
from jaxlm.train.checkpointing import Stores
from jaxlm.train.loop import Run
from jaxlm.train.metric_writer import MetricWriter
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, dropout_key


class TrainerInputs(NamedTuple):
    """A run that can start: the step not yet compiled, its state on the devices, how to read the state, and what
    `result.json` says of what was prepared for it."""

    run: Run
    state: TrainState
    method: Method
    axes: dict[str, Axes]
    facts: dict[str, Any]


def assemble(setting: Setting, workdir: Path, writer: MetricWriter) -> TrainerInputs:
    """Methods, loss, gradient, optimizer and data of `setting`, joined into a Run."""
    training, model = setting.training, setting.model
    check_splits(setting)
    batches, steps = training_batches(setting)
    if training.profile_steps and training.profile_from > steps:
        raise ValueError(f"config.train.profile_from = {training.profile_from}: the run has only {steps} steps")
    methods = [registry.method(entry) for entry in setting.config["methods"]]
    losses, batches, facts = losses_of(setting, batches, steps, writer.info)
    method = chain([*methods, *losses])
    adapted = method.init(setting.key("methods"), model, setting.params, setting.axes)
    plan = blueprint(model, method, adapted, setting.task, training, setting.mesh, setting.rules, steps)
    create = jax.jit(plan.create, out_shardings=plan.placement)
    method_state = jax.device_put(adapted.state, plan.placement.method)
    state = create(
        dropout_key(setting.config["seed"]), shard_tree(plan.params, arrays(plan.placement.params)), method_state
    )

    to_device = to_devices(setting.mesh, setting.rules)
    score = split_evaluator(setting, model, "eval")

    def evaluate(state: TrainState) -> dict[str, float]:
        return score(method.eval_params(state.params, state.method)).metrics if score else {}

    run = Run(
        settings=training,
        steps=steps,
        step=plan.step,
        shardings=plan.placement,
        constants=adapted.constants,
        shapes=batch_shapes(batches, to_device),
        batches=lambda start, stop: prefetch(batches, start, stop, place=to_device),
        evaluate=evaluate,
        stores=stores_in(workdir, training, saved_shapes(plan, adapted, model.config.vocab_size)),
        writer=writer,
    )
    return TrainerInputs(run, state, method, adapted.axes, facts)


def check_splits(setting: Setting) -> None:
    """Raises ValueError where training needs a split that the config lacks, or averages what is not to be baked."""
    select = setting.training.select
    if "train" not in setting.splits:
        raise ValueError("config.data.train is empty; name a file, a glob or a tfds split to train on")
    if setting.training.average_last > 1 and setting.config["methods"] and not setting.config["bake"]:
        raise ValueError(
            f"config.train.average_last = {setting.training.average_last}: what is averaged are baked models, since a "
            "mean of factors or masks is no mean of what they stand for; set config.bake, or average nothing"
        )
    if select and "eval" not in setting.splits:
        raise ValueError(f"config.train.select = {select!r} needs config.data.eval, the data to evaluate on")


def saved_shapes(plan: ShardedStep, adapted: Adapted, vocab_size: int) -> TrainState:
    """Shapes of the state with the vocabulary as long as it is, whatever multiple the mesh wants."""
    params = unpad_vocab(jax.eval_shape(lambda: plan.params), adapted.axes, vocab_size)
    return jax.eval_shape(plan.create, dropout_key(0), params, adapted.state)


def stores_in(workdir: Path, training: TrainSettings, shapes: TrainState) -> Stores:
    """Where a run keeps its checkpoints."""
    averaged = training.average_last
    return Stores(
        shapes,
        latest=Checkpoints(workdir / "checkpoints", keep=training.keep),
        best=Checkpoints(workdir / "best", keep=2),
        recent=Checkpoints(workdir / "recent", keep=averaged + 1) if averaged > 1 else None,
    )
