"""Cross-entropy, squared error and accuracy, each a `(sum, weight)` over the labels that count."""

import jax
import jax.numpy as jnp

from jaxlm.core import Term

IGNORED = -100
"""Label of a position that no loss and no metric counts."""


def log_likelihood(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log p(label)` where the label counts (0 elsewhere), and the float32 0/1 mask of those places.

    Args:
      logits: float `[..., classes]`.
      labels: int `[...]`, `IGNORED` where nothing is to be predicted.
    """
    valid = labels != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    likelihood = chosen.astype(jnp.float32) - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.where(valid, likelihood, 0.0), valid.astype(jnp.float32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Term:
    """`-Σ log p(label)` in nats over the labels that count, and their number.

    >>> term = cross_entropy(jnp.zeros((2, 4)), jnp.array([1, IGNORED]))
    >>> round(float(term.sum), 4), float(term.weight)
    (1.3863, 1.0)
    """
    likelihood, valid = log_likelihood(logits, labels)
    return Term(-jnp.sum(likelihood), jnp.sum(valid))


def squared_error(predictions: jax.Array, targets: jax.Array) -> Term:
    """`Σ (prediction - target)²` over the rows whose target is not NaN, and their number; shapes `[batch]`."""
    valid = ~jnp.isnan(targets)
    error = jnp.where(valid, predictions - jnp.where(valid, targets, 0.0), 0.0)
    return Term(jnp.sum(jnp.square(error)), jnp.sum(valid.astype(jnp.float32)))


def accuracy(logits: jax.Array, labels: jax.Array) -> Term:
    """Number of labels that have the largest logit, and number of labels that count."""
    valid = labels != IGNORED
    hit = (jnp.argmax(logits, axis=-1) == labels) & valid
    return Term(jnp.sum(hit.astype(jnp.float32)), jnp.sum(valid.astype(jnp.float32)))
