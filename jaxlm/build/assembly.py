"""Methods, loss, gradient, optimizer and data of a setting, joined into a run that can start."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.build import registry
from jaxlm.build.blueprint import blueprint
from jaxlm.build.data import batch_shapes, to_devices
from jaxlm.build.setting import Setting, on_mesh, split_evaluator
from jaxlm.core import (
    Axes,
    Method,
    Tree,
    arrays,
    chain,
)
from jaxlm.data.loader import shard
from jaxlm.data.prefetch import prefetch
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.io.model import load
from jaxlm.losses.distillation import Teacher
from jaxlm.models.model import Model
from jaxlm.parallel import shard_tree
from jaxlm.train.journal import Journal
from jaxlm.train.loop import Run
from jaxlm.train.step import TrainState


class Ready(NamedTuple):
    """A run that can start: the step not yet compiled, its state on the devices, and how to read the state."""

    run: Run
    state: TrainState
    method: Method
    axes: dict[str, Axes]


def assemble(setting: Setting, workdir: Path, journal: Journal) -> Ready:
    """Methods, loss, gradient, optimizer and data of `setting`, joined into a Run."""
    training, model = setting.training, setting.model
    method = methods_of(setting)
    adapted = method.init(setting.key("methods"), model, setting.params, setting.axes)
    batches = setting.task.batches(
        setting.splits["train"], setting.tokenizer, setting.data, training.batch_size, setting.config["seed"]
    )
    steps = training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch))
    plan = blueprint(
        model, method, adapted, setting.task, training, setting.mesh, setting.rules, setting.config["seed"], steps
    )
    create = jax.jit(plan.create, out_shardings=plan.placement)
    state = create(shard_tree(plan.params, arrays(plan.placement.params)), adapted.state)

    mine = shard(batches, jax.process_index(), jax.process_count())
    to_device = to_devices(setting.mesh, setting.rules)
    score = split_evaluator(setting, model, "eval")

    def evaluate(state: TrainState) -> dict[str, float]:
        return score(method.eval_params(state.params, state.method)).metrics if score else {}

    keep = max(training.keep, training.average_last)
    run = Run(
        settings=training,
        steps=steps,
        step=plan.step,
        shardings=plan.placement,
        constants=adapted.constants,
        shapes=batch_shapes(mine, to_device),
        batches=lambda start, stop: prefetch(mine, start, stop, place=to_device),
        evaluate=evaluate,
        store=Checkpoints(workdir / "checkpoints", keep=keep),
        best=Checkpoints(workdir / "best", keep=1),
        journal=journal,
    )
    return Ready(run, state, method, adapted.axes)


def methods_of(setting: Setting) -> Method:
    """The chain of `config.methods`, then `config.losses`."""
    named = [registry.method(entry) for entry in setting.config["methods"]]
    for entry in setting.config["losses"]:
        given = {"teacher": teacher(entry["teacher"], setting)} if "teacher" in entry else {}
        rest = {k: v for k, v in entry.items() if k != "teacher"}
        named.append((entry.get("name", ""), registry.make(registry.LOSSES, rest, "losses", **given)))
    return chain(named)


def teacher(directory: str, setting: Setting) -> Teacher:
    """A model directory as a teacher of this run: on the same mesh, deterministic, in the same dtype."""
    lm = load(directory)
    if lm.config.vocab_size != setting.model.config.vocab_size or lm.config.labels != setting.model.config.labels:
        raise ValueError(
            f"teacher {directory} has {lm.config.vocab_size} tokens and labels {lm.config.labels}, the student "
            f"{setting.model.config.vocab_size} and {setting.model.config.labels}; both must be equal"
        )
    if lm.tokenizer is not None and lm.tokenizer.get_vocab() != setting.tokenizer.get_vocab():
        raise ValueError(f"teacher {directory} has another tokenizer; distillation compares token by token")
    model = Model(lm.config)
    ctx, dtype, options = setting.ctx, setting.dtype, {"remat": "none"}

    def forward(params: Tree, batch: dict, taps) -> dict[str, Any]:
        return model.forward(params, batch, ctx=ctx, taps=taps, dtype=dtype, **options)

    params = on_mesh(setting, model, model.run_view(lm.params), model.axes())
    return Teacher(forward, params, lm.config.num_layers, lm.config.hidden_size)
