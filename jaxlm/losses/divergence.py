"""Divergences of a student's distribution from its teacher's, computed from log-probabilities."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxlm.core import lookup

LOWEST = -1e30
"""Logits are clipped here: as improbable as -inf, but `0 · log 0` and its gradient are 0."""

Divergence = Callable[[Float[Array, "*batch classes"], Float[Array, "*batch classes"]], Float[Array, "*batch"]]
"""`(teacher, student) -> divergence`, the arguments as log-probabilities."""


def log_probabilities(
    logits: Float[Array, "*batch classes"], valid: Bool[Array, "*batch"], temperature: float = 1.0
) -> Float32[Array, "*batch classes"]:
    """`log softmax(logits / T)` where valid; uniform elsewhere, whatever the logits are there (NaN too).

    Args:
      logits: -inf and the lowest number mean impossible.
    """
    softened = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0) / temperature
    return jax.nn.log_softmax(jnp.maximum(softened, LOWEST), axis=-1)


def kl(log_p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """`KL(p‖q) = Σ p (log p - log q)` over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl(
    teacher: Float[Array, "*batch classes"], student: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """`KL(teacher‖student)`, mode-covering: the student must give probability to all that the teacher does."""
    return kl(teacher, student)


def reverse_kl(
    teacher: Float[Array, "*batch classes"], student: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """`KL(student‖teacher)`, mode-seeking: the student must avoid what the teacher excludes, and may drop modes.

    Source: Gu et al. 2023, MiniLLM, arXiv:2306.08543.
    """
    return kl(student, teacher)


def jensen_shannon(
    teacher: Float[Array, "*batch classes"], student: Float[Array, "*batch classes"], beta: float = 0.5
) -> Float[Array, "*batch"]:
    """`β KL(teacher‖m) + (1 - β) KL(student‖m)` with `m = β teacher + (1 - β) student`; bounded.

    Divided by β it tends to the forward KL as β → 0, divided by 1 - β to the reverse KL as β → 1. Source: Agarwal et
    al. 2023, GKD, arXiv:2306.13649.

    >>> peaked, uniform = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
    >>> round(float(jensen_shannon(peaked, uniform)), 4), float(jensen_shannon(uniform, uniform))
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
    """The divergence of this name; `beta` belongs to `jsd` (by default 0.5) and to no other.

    Raises:
      ValueError: for an unknown name, a `beta` outside (0, 1), or one that nothing would read.
    """
    divergence = lookup(DIVERGENCES, name, "divergence")
    if beta is None:
        return divergence
    if name != "jsd":
        raise ValueError(f"beta = {beta} weighs the two halves of 'jsd'; the divergence is {name!r}, so leave beta out")
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}; its ends are the divergences forward and reverse")
    return partial(jensen_shannon, beta=beta)
