"""The loss socket: terms that are sums with weights, and functions from a loss to a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.context import Context

Batch = Mapping[str, jax.Array]
"""A batch on the devices; every array is `[rows, …]`."""


class Term(NamedTuple):
    """One term of a loss, or one metric: `coefficient · sum / weight`.

    Sums and weights are added over microbatches, devices and batches and divided once, so a term means the same however
    the data were cut. The weight depends on the batch alone, never on the parameters.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    coefficient: float | Float[Array, ""] = 1.0

    @property
    def mean(self) -> Float[Array, ""]:
        """`sum / weight`, 0 where both are 0."""
        return self.sum / jnp.maximum(self.weight, 1e-9)


Terms = dict[str, Term]


class Tap(NamedTuple):
    """An activation that leaves the forward pass.

    Sites: `hidden` `[batch, length, hidden]` (depth 0 is the embeddings, i the output of layer i-1); and of the
    self-attention of layer i, its depth, `query`, `key` and `value` `[batch, length, heads, head_dim]` as the products
    give them (before any rotation), `scores` `[batch, heads, queries, keys]` as the softmax reads them (the lowest
    number where a key may not be seen) and `attention`, their softmax.
    """

    site: str
    depth: int


class TaskLoss(Protocol):
    """What training minimises."""

    def __call__(self, outputs: Mapping[str, Any], batch: Batch, /) -> Terms:
        """Terms of what the forward pass gave, each a sum and its weight over the labels that count."""
        ...


class LossFn(Protocol):
    """A forward pass and its loss."""

    def __call__(
        self, params: Mapping[str, Any], constants: dict[str, Any], batch: Batch, ctx: Context, /
    ) -> tuple[Terms, dict[str, Any]]:
        """Terms, and the outputs of the forward pass; `params` in either view."""
        ...


class Loss(NamedTuple):
    """A loss and what must be known of it before there is a batch.

    A transform gives `inner._replace(fn=fn)`, with what it adds to the other fields, so that none is forgotten.

    Attributes:
      fn: the forward pass and its terms.
      taps: activations that it reads.
      couples: names of the terms or methods whose value at a row depends on other rows of the batch (in-batch
        negatives, statistics of a batch). A batch in parts is another batch to them, so accumulation refuses them.
    """

    fn: LossFn
    taps: frozenset[Tap] = frozenset()
    couples: frozenset[str] = frozenset()


class GradFn(Protocol):
    """The gradient of a loss in the arrays that train, and in columns of the batch that a method asks for."""

    def __call__(
        self,
        params: Mapping[str, Any],
        constants: dict[str, Any],
        batch: Batch,
        ctx: Context,
        weights: Mapping[str, Float[Array, ""]] | None = None,
        /,
    ) -> tuple[dict[str, jax.Array], Terms]:
        """Gradients by array name or column, and the terms.

        `weights` are those of the whole step, by default the batch's own.
        """
        ...


def add_terms(a: Mapping[str, Term], b: Mapping[str, Term]) -> Terms:
    """Adds sums and weights by name."""
    return {
        name: Term(a[name].sum + b[name].sum, a[name].weight + b[name].weight, b[name].coefficient)
        if name in a and name in b
        else (a.get(name) or b[name])
        for name in {**a, **b}
    }


def total(terms: Mapping[str, Term], weights: Mapping[str, Float[Array, ""]]) -> Float[Array, ""]:
    """`Σ_i c_i · sum_i / W_i` with the weights `W` of the whole step.

    >>> float(total({"ce": Term(jnp.array(6.0), jnp.array(2.0))}, {"ce": jnp.array(4.0)}))
    1.5
    """
    parts = [t.coefficient * t.sum / jnp.maximum(weights[name], 1e-9) for name, t in terms.items()]
    return sum(parts, jnp.zeros((), jnp.float32))
