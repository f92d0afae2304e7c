"""The training step of a model and its methods, before there are data or even parameters: shapes are enough.

A run compiles it for its batches (`assembly`); plans for machines that are elsewhere and listings of parameters need
nothing else.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import (
    Adapted,
    ArrayInfo,
    Axes,
    Context,
    Loss,
    Method,
    Tree,
    arrays,
    check_rules,
    describe,
    first_match,
    trainable,
    widened,
    with_arrays,
)
from jaxlm.models.network import Network
from jaxlm.parallel import pad_vocab, place, shardings, ways
from jaxlm.tasks import Task
from jaxlm.train.gradient import accumulate, gradient
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


def abstract_adapted(method: Method, key: jax.Array, model: Network, params: Tree, axes: Mapping[str, Axes]) -> Adapted:
    """`method.init` on shapes: ShapeDtypeStructs with their axis names.

    Constants that are shapes already (a teacher's, with their places on a mesh) stay what they are.
    """
    names: dict[str, Axes] = {}
    constants: list[Any] = []

    def init(params: Tree) -> tuple[Tree, list, dict]:
        adapted = method.init(key, model, params, dict(axes))
        names.update(adapted.axes)
        leaves, structure = jax.tree.flatten(adapted.constants)
        constants[:] = [leaves, structure]
        return adapted.params, [a for a in leaves if not isinstance(a, jax.ShapeDtypeStruct)], adapted.state

    params, traced, state = jax.eval_shape(init, params)
    leaves, structure = constants
    rest = iter(traced)
    known = [a if isinstance(a, jax.ShapeDtypeStruct) else next(rest) for a in leaves]
    return Adapted(params, names, jax.tree.unflatten(structure, known), state)


def blueprint(
    model: Network,
    method: Method,
    adapted: Adapted,
    task: Task,
    training: TrainSettings,
    mesh: jax.sharding.Mesh,
    rules: Mapping[str, Any],
    steps: int,
) -> ShardedStep:
    """Loss, gradient, optimizer and placement of one step of a run of `steps`.

    Args:
      adapted: what `method.init` gave for the canonical view, arrays or shapes.
      rules: from axis names to mesh axes (`make_rules`).
    """
    verdicts = [method.trainable, rule_verdict(training, describe(adapted.params).values())]
    adapted = adapted._replace(params=widened(adapted.params, verdicts))
    ctx, dtype = Context(place=place(mesh, rules)), jnp.dtype(training.dtype)

    def base(taps: frozenset) -> Loss:
        def fn(params: Tree, constants: dict, batch: dict, ctx: Context):
            outputs = model.forward(params, batch, ctx=ctx, taps=taps, remat=training.remat, dtype=dtype)
            return task.loss(outputs, batch), outputs

        return Loss(fn, taps)

    taps = method.loss(base(frozenset())).taps  # what the transforms read is known once they are applied
    loss = method.loss(base(taps))
    grad = method.grad(accumulate(gradient(loss, verdicts), loss, training.grad_accum))

    params = model.run_view(adapted.params, layer_verdict(adapted.params, verdicts, training), tap_breaks(taps, model))
    params = pad_vocab(params, adapted.axes, ways("vocab", mesh, rules))
    where = shardings(params, adapted.axes, mesh, rules, model.sizes())
    infos = describe(params)
    trained = {name: info for name, info in infos.items() if trainable(verdicts, info)}
    if not trained:
        raise ValueError("nothing trains: config.train.trainable and the methods freeze every parameter")

    tx = optimizer(training, steps, trained)

    def create(key: jax.Array, params: Tree, method_state: dict) -> TrainState:
        return create_state(key, params, method_state, tx, verdicts)

    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    placement = state_shardings(jax.eval_shape(create, dropout_key(0), params, adapted.state), where, replicated)
    step = make_step(grad, tx, method, verdicts, ctx=ctx, largest_norm=training.clip)
    return ShardedStep(step, create, params, placement, infos, frozenset(trained))


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


def tap_breaks(taps: frozenset, model: Network) -> set[int]:
    """Layers that begin a segment of their own, so that only tapped activations leave the scan.

    A hidden state lies between two layers; whatever else is tapped needs its layer alone in a segment. Where most
    layers are tapped, one scan that gives out all of them is smaller than many short ones.
    """
    breaks = {tap.depth for tap in taps} | {tap.depth + 1 for tap in taps if tap.site != "hidden"}
    return breaks if 2 * len(breaks) <= model.config.num_layers else set()


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
