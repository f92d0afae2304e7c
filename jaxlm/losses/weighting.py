"""From one value a position to a term: which positions count, and how much."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.core import Term

SampleWeights = Float[Array, "batch"] | Float[Array, "batch length"]
"""One weight a sample, or one a position; may be NaN where nothing is valid."""


def weighted_term(
    values: Float[Array, "*positions"], valid: Bool[Array, "*positions"], weights: SampleWeights | None = None
) -> Term:
    """`Σ_valid w · value` and `Σ_valid w`; w is 1 without `weights`.

    Args:
      values: `[batch, ...]`, finite where valid.

    >>> valid = jnp.array([[True, True], [True, False]])
    >>> term = weighted_term(jnp.array([[1.0, 2.0], [5.0, 9.0]]), valid, jnp.array([2.0, 1.0]))
    >>> float(term.sum), float(term.weight)
    (11.0, 5.0)
    """
    share = valid.astype(jnp.float32)
    if weights is not None:
        if weights.ndim > values.ndim:
            raise ValueError(f"weights {weights.shape} for values {values.shape}: give one weight a sample")
        weights = weights.astype(jnp.float32).reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
        share = jnp.where(valid, weights, 0.0)
    return Term(jnp.sum(jnp.where(valid, values, 0.0) * share), jnp.sum(share))
