"""The training step of a model and its methods, before there are batches or even parameters: shapes are enough.

A run compiles it for its batches (`trainer`); plans for machines that are elsewhere and listings of parameters need
nothing else (`dry_run`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jaxlm.core import (
    ArrayInfo,
    Batch,
    Context,
    Loss,
    Method,
    MethodInit,
    Tree,
    arrays,
    check_rules,
    describe,
    first_match,
    trained_names,
    widened,
    with_arrays,
)
from jaxlm.core.partition import Verdict
from jaxlm.parallel import num_shards, pad_vocab, shardings
from jaxlm.runner.run_setup import RunSetup
from jaxlm.train.gradient import step_gradient
from jaxlm.train.optimizer import decays, optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, create_state, dropout_key, make_step


class ShardedStep(NamedTuple):
    """A step and where its state lies.

    Attributes:
      step: `(state, constants, batch) -> (state, log)`, to compile.
      create: `(dropout key, params, method state) -> state` before the first step, to compile.
      params: run view, the vocabulary padded; arrays, or shapes where shapes went in.
      placement: shardings of the state, a tree like it.
      infos: what every array of the run view is; trained: names of those that train.
    """

    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    create: Callable[[jax.Array, Tree, dict], TrainState]
    params: Tree
    placement: TrainState
    infos: dict[str, ArrayInfo]
    trained: frozenset[str]


def sharded_step(setup: RunSetup, method: Method, start: MethodInit, steps: int) -> ShardedStep:
    """Loss, gradient, optimizer and placement of one step of a run of `steps`.

    Args:
      start: what `method.init` gave, arrays or shapes.
    """
    training, network, axes = setup.training, start.lm.network, start.lm.axes
    infos = describe(start.lm.params)
    verdicts = [method.trainable, rule_verdict(training, infos.values())]
    trained = trained_names(infos, verdicts)
    if not trained:
        raise ValueError("nothing trains: config.train.trainable and the methods freeze every parameter")
    canonical = widened(start.lm.params, trained)

    def base(taps: frozenset) -> Loss:
        def fn(params: Tree, constants: dict, batch: Batch, ctx: Context):
            outputs = network.forward(params, batch, ctx=ctx, taps=taps, remat=training.remat, dtype=setup.dtype)
            return setup.task.loss(outputs, batch), outputs

        coupled = {f"the task {setup.config['task']!r}"} if setup.task.couples_rows else set()
        return Loss(fn, taps, frozenset(coupled))

    # What the transforms of the loss read is known once they are applied.
    taps = method.loss(base(frozenset())).taps

    # The run view: layers stacked where structure and verdicts are equal, the vocabulary padded, every array placed.
    params = network.run_view(canonical, layer_verdict(infos, trained, training), network.tap_breaks(taps))
    params = pad_vocab(params, axes, num_shards("vocab", setup.mesh, setup.rules))
    where = shardings(params, axes, setup.mesh, setup.rules, network.sizes())
    infos = describe(params)
    trained = trained_names(infos, verdicts)

    loss = method.loss(base(taps))
    grad = step_gradient(method, loss, trained, training.grad_accum)
    tx = optimizer(training, steps, {name: info for name, info in infos.items() if name in trained})

    def create(key: jax.Array, params: Tree, method_state: dict) -> TrainState:
        return create_state(key, params, method_state, tx, trained)

    replicated = jax.sharding.NamedSharding(setup.mesh, jax.P())
    placement = state_shardings(jax.eval_shape(create, dropout_key(0), params, start.state), where, replicated)
    step = make_step(grad, tx, method, trained, ctx=setup.ctx, largest_norm=training.clip)
    return ShardedStep(step, create, params, placement, infos, trained)


def rule_verdict(training: TrainSettings, infos: Iterable[ArrayInfo]) -> Verdict:
    """`config.train.trainable` as a verdict; its rules are checked against every parameter."""
    rules = training.rules("trainable")
    check_rules(rules, infos, "config.train.trainable")
    return lambda info: first_match(rules, info.path, info.role)


def layer_verdict(
    infos: Mapping[str, ArrayInfo], trained: Collection[str], training: TrainSettings
) -> Callable[[str], tuple]:
    """What must be equal for layers to be stacked besides their structure: what trains, and what decays."""
    by_layer: dict[str, list] = {}
    for name, info in infos.items():
        match = re.match(r"((?:.*/)?layers_\d+)/(.*)", name)
        if match:
            by_layer.setdefault(match[1], []).append((match[2], name in trained, decays(info, training)))
    return lambda layer: tuple(sorted(by_layer[layer]))


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
        key=replicated,
        params=with_arrays(state.params, where),
        optimizer=jax.tree_util.tree_map_with_path(mirror, state.optimizer),
        method=jax.tree.map(lambda _: replicated, state.method),
    )
