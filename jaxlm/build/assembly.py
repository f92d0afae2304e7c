"""Methods, loss, gradient, optimizer and data of a setting, joined into a run that can start."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.build import registry
from jaxlm.build.data import batch_shapes, to_devices
from jaxlm.build.setting import Setting, on_mesh, split_evaluator
from jaxlm.core import (
    Axes,
    Context,
    Loss,
    Method,
    Tree,
    arrays,
    chain,
    check_rules,
    describe,
    first_match,
    trainable,
    with_arrays,
)
from jaxlm.data.loader import shard
from jaxlm.data.prefetch import prefetch
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.io.model import load
from jaxlm.losses.distillation import Teacher
from jaxlm.models.model import Model
from jaxlm.parallel import pad_vocab, shard_tree, shardings, ways
from jaxlm.train.gradient import accumulate, gradient
from jaxlm.train.journal import Journal
from jaxlm.train.loop import Run
from jaxlm.train.optimizer import decays, optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, create_state, make_step


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
    freeze = rule_verdict(training, describe(adapted.params).values())
    verdicts = [method.trainable, freeze]

    def base(taps: frozenset) -> Loss:
        def fn(params: Tree, constants: dict, batch: dict, ctx: Context):
            outputs = model.forward(params, batch, ctx=ctx, taps=taps, remat=training.remat, dtype=setting.dtype)
            return setting.task.loss(outputs, batch), outputs

        return Loss(fn, taps)

    taps = method.loss(base(frozenset())).taps  # what the transforms read is known once they are applied
    loss = method.loss(base(taps))
    grad = method.grad(accumulate(gradient(loss, verdicts), loss, training.grad_accum))

    params = model.run_view(adapted.params, layer_verdict(adapted.params, verdicts, training), tap_breaks(taps, model))
    params = pad_vocab(params, adapted.axes, ways("vocab", setting.mesh, setting.rules))
    where = shardings(params, adapted.axes, setting.mesh, setting.rules, model.sizes())
    infos = {n: i for n, i in describe(params).items() if trainable(verdicts, i)}
    if not infos:
        raise ValueError("nothing trains: config.train.trainable and the methods freeze every parameter")

    batches = setting.task.batches(
        setting.splits["train"], setting.tokenizer, setting.data, training.batch_size, setting.config["seed"]
    )
    steps = training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch))
    tx = optimizer(training, steps, infos)
    replicated = jax.sharding.NamedSharding(setting.mesh, jax.P())
    abstract = jax.eval_shape(lambda p, m: create_state(p, m, tx, verdicts), params, adapted.state)
    placement = state_shardings(abstract, where, replicated)
    create = jax.jit(lambda p, m: create_state(p, m, tx, verdicts), out_shardings=placement)
    state = create(shard_tree(params, where), adapted.state)

    step = make_step(
        grad,
        tx,
        method,
        verdicts,
        key=jax.random.key(setting.config["seed"], impl="rbg"),
        ctx=setting.ctx,
        largest_norm=training.clip,
    )
    mine = shard(batches, jax.process_index(), jax.process_count())
    to_device = to_devices(setting.mesh, setting.rules)
    score = split_evaluator(setting, model, "eval")

    def evaluate(state: TrainState) -> dict[str, float]:
        return score(method.eval_params(state.params, state.method)).metrics if score else {}

    keep = max(training.keep, training.average_last)
    run = Run(
        settings=training,
        steps=steps,
        step=step,
        shardings=placement,
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


def rule_verdict(training: TrainSettings, infos: Any):
    """`config.train.trainable` as a verdict; its rules are checked against every parameter."""
    rules = training.rules("trainable")
    check_rules(rules, infos, "config.train.trainable")
    return lambda info: first_match(rules, info.path, info.role)


def layer_verdict(params: Tree, verdicts: list, training: TrainSettings):
    """What must be equal for layers to be stacked besides their structure: what trains, and what decays."""
    by_layer: dict[str, list] = {}
    for name, info in describe(params).items():
        found = re.match(r"((?:.*/)?layers_\d+)/(.*)", name)
        if found:
            by_layer.setdefault(found[1], []).append((found[2], trainable(verdicts, info), decays(info, training)))
    return lambda layer: tuple(sorted(by_layer[layer]))


def tap_breaks(taps: frozenset, model: Model) -> set[int]:
    """Layers that begin a segment of their own, so that only tapped activations leave the scan.

    Where most layers are tapped, one scan that gives out all of them is smaller than many short ones.
    """
    tapped = {tap.depth for tap in taps if tap.site == "hidden"}
    return tapped if 2 * len(tapped) <= model.config.num_layers else set()


def state_shardings(state: TrainState, where: Mapping[str, Any], replicated: Any) -> TrainState:
    """Shardings of a whole state: optimizer arrays lie where the parameter of their name and shape lies."""
    shapes = {name: array.shape for name, array in arrays(state.params).items()}

    def mirror(path: tuple, leaf: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        same = names and names[-1] in where and shapes[names[-1]] == leaf.shape
        return where[names[-1]] if same else replicated

    return TrainState(
        step=replicated,
        nonfinite=replicated,
        params=with_arrays(state.params, where),
        optimizer=jax.tree_util.tree_map_with_path(mirror, state.optimizer),
        method=jax.tree.map(lambda _: replicated, state.method),
    )
