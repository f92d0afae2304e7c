"""Cross-entropy and squared error, each a `(sum, weight)` over the labels that count."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxlm.core import Term

IGNORED = -100
"""Label of a position that no loss and no metric counts, as in PyTorch and transformers."""


def log_likelihood(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """`log p(label)` where the label is not `IGNORED` (0 elsewhere), and 1 for these positions, else 0."""
    valid = labels != IGNORED
    label_logits = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    likelihood = label_logits.astype(jnp.float32) - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.where(valid, likelihood, 0.0), valid.astype(jnp.float32)


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Term:
    """`-Σ log p(label)` in nats over the labels that count, and their number.

    >>> term = cross_entropy(jnp.zeros((2, 4)), jnp.array([1, IGNORED]))
    >>> round(float(term.sum), 4), float(term.weight)
    (1.3863, 1.0)
    """
    likelihood, valid = log_likelihood(logits, labels)
    return Term(-jnp.sum(likelihood), jnp.sum(valid))


def squared_error(predictions: Float[Array, "*batch"], targets: Float[Array, "*batch"]) -> Term:
    """`Σ (prediction - target)²` over the targets that are not NaN, and their number."""
    valid = ~jnp.isnan(targets)
    error = jnp.where(valid, predictions - jnp.where(valid, targets, 0.0), 0.0)
    return Term(jnp.sum(jnp.square(error)), jnp.sum(valid.astype(jnp.float32)))
