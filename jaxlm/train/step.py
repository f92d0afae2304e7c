"""One update: loss, gradients, gradient transforms, masks, clipping, optimizer, methods."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxlm.core import Context, GradFn, Method, Step, Tree, is_stacked, merge, partition
from jaxlm.train.optimizer import moments, with_moments


class TrainState(struct.PyTreeNode):
    """Everything that changes while training, and nothing else.

    Attributes:
      step: int32, updates taken (skipped ones included).
      nonfinite: int32, consecutive updates skipped because a gradient was not finite.
      key: uint32 `[2]`, the dropout key of the run (`dropout_key`). It never changes; as a part of the state it is data
        to the compiled step, which so is the same for every seed.
      params: the run view.
      optimizer: optax state over the trained arrays.
      method: state of the methods.
    """

    step: jax.Array
    nonfinite: jax.Array
    key: jax.Array
    params: Tree
    optimizer: Any
    method: dict[str, Any]


def dropout_key(seed: int) -> jax.Array:
    """The dropout key of a run, as the state holds it."""
    return jax.random.key_data(jax.random.key(seed))


def create_state(
    key: jax.Array,
    params: Tree,
    method_state: dict[str, Any],
    optimizer: optax.GradientTransformation,
    trained: Collection[str],
) -> TrainState:
    """The state before the first update.

    Args:
      key: a `dropout_key`.
      trained: names of the arrays that train.

    Raises:
      ValueError: for a trained array that is not float32, whose updates would be lost in rounding, or be of another
        dtype than it.
    """
    values, _ = partition(params, trained)
    for name, array in values.items():
        if array.dtype != jnp.float32:
            raise ValueError(f"{name} trains and is {array.dtype}: what trains must be float32 (`core.widened`)")
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, key, params, optimizer.init(values), method_state)


def clip(grads: Mapping[str, jax.Array], norm: jax.Array, largest: float) -> dict[str, jax.Array]:
    """Gradients scaled to at most `largest` in global norm; unchanged for 0."""
    if not largest:
        return dict(grads)
    return {name: g * jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-9)) for name, g in grads.items()}


def _squares(name: str, gradient: jax.Array) -> jax.Array:
    """The sum of a gradient's squares: float32, or for stacked layers float32 `[layers]`.

    A product of the gradient with itself, because a CPU would write down all squares before it adds them.
    """
    leading = 1 if is_stacked(name) else 0
    layers, rest = tuple(range(leading)), tuple(range(leading, gradient.ndim))
    dimensions = ((rest, rest), (layers, layers))
    return jax.lax.dot_general(gradient, gradient, dimensions, precision="highest", preferred_element_type=jnp.float32)


def make_step(
    grad: GradFn,
    optimizer: optax.GradientTransformation,
    method: Method,
    trained: Collection[str],
    *,
    ctx: Context,
    largest_norm: float,
) -> Callable[[TrainState, dict, dict], tuple[TrainState, dict[str, Any]]]:
    """The function to compile: `(state, constants, batch) -> (state, log)`.

    The dropout key is folded from the step's number, so a resumed run draws the bits of an uninterrupted one. An update
    with a gradient that is not finite leaves parameters and optimizer as they were; `log["finite"]` says which arrays
    were (their squares add up to a number), those of stacked layers one by one.

    Args:
      grad: gradient of the loss, with its transforms.
      optimizer: over the trained arrays.
      method: the chain of the run's methods.
      trained: names of the arrays that train.
      ctx: placement of activations.
      largest_norm: clipping, 0 for none.
    """

    def step(state: TrainState, constants: dict, batch: dict) -> tuple[TrainState, dict[str, Any]]:
        now = ctx.replace(key=jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step))
        grads, terms = grad(state.params, constants, batch, now)
        values, frozen = partition(state.params, trained)
        squares = {name: _squares(name, g) for name, g in grads.items()}
        finite = {name: jnp.isfinite(square) for name, square in squares.items()}
        seen = method.mask(state.params, grads)
        norm = jnp.sqrt(sum((squares[n] if g is grads[n] else _squares(n, g)).sum() for n, g in seen.items()))
        ok = jnp.isfinite(norm) & jnp.array([is_finite.all() for is_finite in finite.values()]).all()
        updates, new_optimizer = optimizer.update(clip(seen, norm, largest_norm), state.optimizer, values)
        updated = optax.apply_updates(values, updates)

        names = frozenset(values)
        updated = merge(state.params, updated, frozen)
        result = Step(updated, moments(new_optimizer, names), state.method, previous=state.params)
        result = method.update(result, grads, constants, state.step + 1)
        new = TrainState(
            state.step + 1,
            jnp.zeros((), jnp.int32),
            state.key,
            result.params,
            with_moments(new_optimizer, names, result.moments),
            result.state,
        )
        skipped = state.replace(step=state.step + 1, nonfinite=state.nonfinite + 1)
        state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, skipped)
        log = {"terms": {n: (t.sum, t.weight, t.coefficient) for n, t in terms.items()}, "gradient_norm": norm}
        return state, log | {"nonfinite": state.nonfinite, "finite": finite}

    return step
