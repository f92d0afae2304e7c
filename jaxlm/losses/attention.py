"""Distilling attention, as scores or as probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.core import Term
from jaxlm.losses.divergence import LOWEST, kl
from jaxlm.losses.weighting import SampleWeights, weighted_term

HeadPairs = tuple[tuple[int, int], ...]
MEASURES = ("probabilities", "scores")


def attention_distance(
    teacher: Float[Array, "batch teacher_heads length length"],
    student: Float[Array, "batch student_heads length length"],
    tokens: Bool[Array, "batch length"],
    on: str = "probabilities",
    heads: str | HeadPairs = "match",
    weights: SampleWeights | None = None,
) -> Term:
    """Distance of two attentions, a mean over heads for every query that is a token, and the weight of those queries.

    On probabilities `KL(softmax t ‖ softmax s)`; on scores the mean of `(t - s)²` over the keys that the query attends
    to. Padding is left out, and so are keys that either model masks. Sources: Jiao et al. 2020, TinyBERT,
    arXiv:1909.10351 (scores); Wang et al. 2020, MiniLM, arXiv:2002.10957 (probabilities).

    Args:
      teacher, student: attention scores, the lowest number where a key is masked.
      tokens: true for tokens, false for padding.
      on: `probabilities` or `scores`.
      heads: `match` compares heads one to one, and their means where their numbers differ; `mean` always the means (of
        probabilities, or of scores); or pairs `(student, teacher)`.
    """
    check_heads(heads, student.shape[1], teacher.shape[1])
    seen = tokens[:, :, None] & tokens[:, None, :]
    seen &= (teacher[:, 0] > LOWEST) & (student[:, 0] > LOWEST)
    seen = seen[:, None]
    teacher, student = (x.astype(jnp.float32) for x in (jax.lax.stop_gradient(teacher), student))
    if not isinstance(heads, str):
        student_heads, teacher_heads = (jnp.array(side) for side in zip(*heads, strict=True))
        teacher, student = teacher[:, teacher_heads], student[:, student_heads]
    averaged = heads == "mean" or teacher.shape[1] != student.shape[1]
    if on == "scores":
        t, s = (jnp.where(seen, x, 0.0) for x in (teacher, student))
        if averaged:
            t, s = (x.mean(axis=1, keepdims=True) for x in (t, s))
        distance = jnp.sum(jnp.square(t - s), axis=-1) / jnp.maximum(seen.sum(axis=-1), 1)
    else:
        t, s = (jax.nn.log_softmax(jnp.where(seen, x, LOWEST), axis=-1) for x in (teacher, student))
        if averaged:
            t, s = (jax.nn.logsumexp(x, axis=1, keepdims=True) - jnp.log(x.shape[1]) for x in (t, s))
        distance = kl(t, s)
    return weighted_term(distance.mean(axis=1), tokens, weights)


def check_heads(heads: str | HeadPairs, student: int, teacher: int) -> None:
    """Raises ValueError for head pairs of heads that do not exist, or an unknown way to pair them."""
    if isinstance(heads, str):
        if heads not in ("match", "mean"):
            raise ValueError(f"unknown heads {heads!r}; known: match, mean, or (student, teacher) pairs")
        return
    for s, t in heads:
        if not (0 <= s < student and 0 <= t < teacher):
            raise ValueError(f"head pair ({s}, {t}) does not exist: 0..{student - 1} and 0..{teacher - 1} do")
