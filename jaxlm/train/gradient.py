"""The gradient socket: gradients of the trainable part, their exact accumulation over microbatches, and transforms."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Batch, Context, GradFn, Loss, Method, Term, Terms, merge, partition, total


def step_gradient(method: Method, loss: Loss, trained: Collection[str], microbatches: int) -> GradFn:
    """The gradient of a whole step, transforms of the method included.

    From the inside to the outside: the gradient of a microbatch, `method.microbatch_grad`, accumulation, `method.grad`.

    Args:
      method: the chain of the run's methods.
      loss: with the method's transforms.
      trained: names of the arrays that train.
      microbatches: equal parts of the batch, one after the other.

    Raises:
      ValueError: see `gradient` and `accumulate`; and while it is traced, when a gradient in a column of the batch is
        left: rows differ from microbatch to microbatch, so it can neither be added up nor be a gradient of the step.
    """
    inner = method.microbatch_grad(gradient(loss, trained, method.grad_columns))

    def of_parameters(params, constants, batch, ctx: Context, weights: Mapping[str, jax.Array] | None = None):
        grads, terms = inner(params, constants, batch, ctx, weights)
        if left := sorted(method.grad_columns & grads.keys()):
            raise ValueError(
                f"the gradient in {', '.join(left)} leaves its microbatch: the method that has the column in "
                "grad_columns takes it out of the gradients in its microbatch_grad"
            )
        return grads, terms

    return method.grad(accumulate(of_parameters, loss, microbatches))


def gradient(loss: Loss, trained: Collection[str], columns: Collection[str] = ()) -> GradFn:
    """Gradient of `Σ c_i sum_i / W_i` in the arrays named `trained`; `W` is the batch's own weight unless given.

    Args:
      loss: what is differentiated.
      trained: names of arrays of the parameters.
      columns: names of columns of the batch, float32 `[rows, …]`, in which the gradient is taken too, by the same
        backward pass; it stands under the name of the column. Terms read them, weights do not.

    Raises:
      ValueError: for a column with the name of an array; while it is traced, for one that the batch does not have or
        that is not float32.
    """
    if both := sorted(set(columns) & set(trained)):
        raise ValueError(f"{', '.join(both)}: both an array that trains and a column of the batch; rename the column")

    def fn(params, constants, batch, ctx: Context, weights: Mapping[str, jax.Array] | None = None):
        values, frozen = partition(params, trained)
        activations = _activations(batch, columns)

        def objective(values: dict[str, jax.Array], activations: dict[str, jax.Array]) -> tuple[jax.Array, Terms]:
            terms, _ = loss.fn(merge(params, values, frozen), constants, {**batch, **activations}, ctx)
            of_batch = {name: jax.lax.stop_gradient(t.weight) for name, t in terms.items()}
            return total(terms, of_batch if weights is None else weights), terms

        (of_values, of_activations), terms = jax.grad(objective, (0, 1), has_aux=True)(values, activations)
        return {**of_values, **of_activations}, terms

    return fn


def _activations(batch: Batch, columns: Collection[str]) -> dict[str, jax.Array]:
    """The columns that the gradient is taken in."""
    for name in sorted(columns):
        if name not in batch:
            raise ValueError(
                f"the gradient is taken in {name}, which is no column of the batch: the method that has it in "
                "grad_columns adds it in its microbatch_grad, before it calls the gradient inside"
            )
        if batch[name].dtype != jnp.float32:
            raise ValueError(f"the gradient is taken in {name}, which is {batch[name].dtype}: it must be float32")
    return {name: batch[name] for name in columns}


def accumulate(inner: GradFn, loss: Loss, microbatches: int) -> GradFn:
    """The gradient of the whole batch, computed in `microbatches` equal parts, one after the other.

    A first pass adds up the weights of every term; it reads the batch alone, so the compiler drops the network from it.
    Each part then minimises `Σ c_i sum_i / W_i` with the weights of the whole step, and the parts simply add up. Rows
    are dealt out in turn (0, n, 2n, … to the first part), so that each part spans all devices.

    Raises:
      ValueError: for several microbatches of a loss that couples rows.
    """
    if microbatches == 1:
        return inner
    if loss.couples:
        raise ValueError(
            f"{', '.join(sorted(loss.couples))}: the loss of a row depends on the other rows of its batch, and "
            f"config.train.grad_accum = {microbatches} computes a batch in {microbatches} parts, which do not see each "
            "other; set it to 1, and lower config.train.batch_size, use more devices, or set config.train.remat where "
            "memory does not suffice"
        )

    def fn(params, constants, batch, ctx: Context, weights: Any = None):
        parts = jax.tree.map(lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch)

        def weigh(part: dict[str, jax.Array]) -> dict[str, jax.Array]:
            terms, _ = loss.fn(params, constants, part, ctx)
            return {name: term.weight for name, term in terms.items()}

        whole = jax.tree.map(lambda w: w.sum(0), jax.lax.map(weigh, parts)) if weights is None else weights

        def add(done: Any, inputs: Any) -> tuple[Any, Terms]:
            part, number = inputs
            grads, terms = inner(params, constants, part, ctx.at(number), whole)
            return jax.tree.map(jnp.add, done, grads), terms

        first = jax.tree.map(lambda a: a[0], parts)
        shapes, _ = jax.eval_shape(lambda: inner(params, constants, first, ctx.at(0), whole))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        grads, by_part = jax.lax.scan(add, zeros, (parts, jnp.arange(microbatches)))
        return grads, {
            n: Term(t.sum.sum(0), t.weight.sum(0), jnp.asarray(t.coefficient)[-1]) for n, t in by_part.items()
        }

    return fn
