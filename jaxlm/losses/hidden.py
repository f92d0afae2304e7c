"""Distilling hidden states."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.core import Term
from jaxlm.losses.weighting import SampleWeights, weighted_term


def hidden_distance(
    teacher: Float[Array, "batch length hidden"],
    student: Float[Array, "batch length hidden"],
    valid: Bool[Array, "batch length"],
    weights: SampleWeights | None = None,
) -> Term:
    """`Σ_valid w mean_j (t_j - s_j)²` of hidden states, and `Σ_valid w`.

    Source: Jiao et al. 2020, TinyBERT, arXiv:1909.10351.

    >>> float(hidden_distance(jnp.zeros((1, 1, 2)), jnp.array([[[1.0, 3.0]]]), jnp.array([[True]])).mean)
    5.0
    """
    clean = lambda x: jnp.where(valid[..., None], x.astype(jnp.float32), 0.0)  # noqa: E731
    difference = clean(student) - jax.lax.stop_gradient(clean(teacher))
    return weighted_term(jnp.mean(jnp.square(difference), axis=-1), valid, weights)
