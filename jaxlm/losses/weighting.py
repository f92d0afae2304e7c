"""From one value a position to a term: who counts, and how much."""

import jax
import jax.numpy as jnp

from jaxlm.core import Term


def weighed(each: jax.Array, valid: jax.Array, weights: jax.Array | None = None) -> Term:
    """`Σ_valid w · each` and `Σ_valid w`; w is 1 without `weights`.

    Args:
      each: float `[batch, ...]`, finite where valid.
      valid: bool, of the same shape.
      weights: float `[batch]`, one a sample, or `[batch, length]`, one a position; may be NaN where nothing is valid.

    >>> valid = jnp.array([[True, True], [True, False]])
    >>> term = weighed(jnp.array([[1.0, 2.0], [5.0, 9.0]]), valid, jnp.array([2.0, 1.0]))
    >>> float(term.sum), float(term.weight)
    (11.0, 5.0)
    """
    share = valid.astype(jnp.float32)
    if weights is not None:
        if weights.ndim > each.ndim:
            raise ValueError(f"weights {weights.shape} for values {each.shape}: one a sample is needed here")
        weights = weights.astype(jnp.float32).reshape(weights.shape + (1,) * (each.ndim - weights.ndim))
        share = jnp.where(valid, weights, 0.0)
    return Term(jnp.sum(jnp.where(valid, each, 0.0) * share), jnp.sum(share))
