"""The gradient socket: gradients of the trainable part, and their exact accumulation over microbatches."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Context, GradFn, Loss, Term, Terms, merge, partition, total


def gradient(loss: Loss, trained: Collection[str]) -> GradFn:
    """Gradient of `Σ c_i sum_i / W_i` in the arrays named `trained`; `W` is the batch's own weight unless given."""

    def fn(params, constants, batch, ctx: Context, weights: Mapping[str, jax.Array] | None = None):
        values, frozen = partition(params, trained)

        def objective(values: dict[str, jax.Array]) -> tuple[jax.Array, Terms]:
            terms, _ = loss.fn(merge(params, values, frozen), constants, batch, ctx)
            of_batch = {name: jax.lax.stop_gradient(t.weight) for name, t in terms.items()}
            return total(terms, of_batch if weights is None else weights), terms

        return jax.grad(objective, has_aux=True)(values)

    return fn


def accumulate(inner: GradFn, loss: Loss, microbatches: int) -> GradFn:
    """The gradient of the whole batch, computed in `microbatches` equal parts, one after the other.

    A first pass adds up the weights of every term; it reads the batch alone, so the compiler drops the network from it.
    Each part then minimises `Σ c_i sum_i / W_i` with the weights of the whole step, and the parts simply add up. Rows
    are dealt out in turn (0, n, 2n, … to the first part), so that each part spans all devices.
    """
    if microbatches == 1:
        return inner

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
