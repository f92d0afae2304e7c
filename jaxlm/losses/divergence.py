"""How far a student's distribution is from its teacher's, on log-probabilities `[..., classes]`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.core import lookup

LOWEST = -1e30
"""Logits below count as this: as improbable as -inf, but `0 · log 0` and its gradient are 0."""

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def log_probabilities(logits: jax.Array, valid: jax.Array, temperature: float = 1.0) -> jax.Array:
    """`log softmax(logits / T)` in float32 where valid; uniform elsewhere, whatever stands there.

    Args:
      logits: float `[..., classes]`; -inf and the lowest number mean impossible.
      valid: bool `[...]`.
    """
    softened = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0) / temperature
    return jax.nn.log_softmax(jnp.maximum(softened, LOWEST), axis=-1)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`KL(p‖q) = Σ p (log p - log q)` over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """`KL(teacher‖student)`: the student must cover whatever the teacher holds possible."""
    return kl(teacher, student)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """`KL(student‖teacher)`: the student must avoid what the teacher holds impossible, and may settle on one mode.

    Source: Gu et al. 2023, MiniLLM, arXiv:2306.08543.
    """
    return kl(student, teacher)


def jensen_shannon(teacher: jax.Array, student: jax.Array, beta: float = 0.5) -> jax.Array:
    """`β KL(teacher‖m) + (1 - β) KL(student‖m)` with `m = β teacher + (1 - β) student`; bounded.

    Divided by β it tends to the forward direction as β → 0, divided by 1 - β to the reverse as β → 1. Source: Agarwal
    et al. 2023, GKD, arXiv:2306.13649.

    >>> certain, even = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
    >>> round(float(jensen_shannon(certain, even)), 4), float(jensen_shannon(even, even))
    (0.1017, 0.0)
    """
    middle = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jensen_shannon,
}


def divergence_of(name: str, beta: float | None = None) -> Divergence:
    """The divergence of a name; `beta` belongs to `jsd` (0.5 unless given) and to no other.

    Raises:
      ValueError: for an unknown name, a `beta` outside (0, 1), or one that nothing would read.
    """
    measure = lookup(DIVERGENCES, name, "divergence")
    if beta is None:
        return measure
    if name != "jsd":
        raise ValueError(f"beta = {beta} weighs the two halves of 'jsd'; the divergence is {name!r}, so leave beta out")
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}; its ends are the divergences forward and reverse")
    return partial(jensen_shannon, beta=beta)
