"""Learning where a teacher looks: its attention, as scores or as probabilities."""

import jax
import jax.numpy as jnp

from jaxlm.core import Term
from jaxlm.losses.divergence import LOWEST, kl
from jaxlm.losses.weighting import weighed

HeadPairs = tuple[tuple[int, int], ...]
MEASURES = ("probabilities", "scores")


def attention_distance(
    teacher: jax.Array,
    student: jax.Array,
    tokens: jax.Array,
    on: str = "probabilities",
    heads: str | HeadPairs = "match",
    weights: jax.Array | None = None,
) -> Term:
    """Distance of two attentions, a mean over heads for every query that is a token, and the weight of those queries.

    On probabilities `KL(softmax t ‖ softmax s)`; on scores the mean of `(t - s)²` over the keys that the query may see.
    Only tokens count, and only the keys that teacher and student may both see. Sources: Jiao et al. 2020, TinyBERT,
    arXiv:1909.10351 (scores); Wang et al. 2020, MiniLM, arXiv:2002.10957 (probabilities).

    Args:
      teacher, student: scores `[batch, heads, queries, keys]`, the lowest number where a key may not be seen.
      tokens: bool `[batch, length]`, not padding.
      on: `probabilities` or `scores`.
      heads: `match` compares heads one to one, and their means where their numbers differ; `mean` always the means (of
        probabilities, or of scores); or pairs `(student's, teacher's)`.
      weights: of samples or tokens, see `weighed`.
    """
    check_heads(heads, student.shape[1], teacher.shape[1])
    seen = tokens[:, :, None] & tokens[:, None, :]
    seen &= (teacher[:, 0] > LOWEST) & (student[:, 0] > LOWEST)
    seen = seen[:, None]
    teacher, student = (x.astype(jnp.float32) for x in (jax.lax.stop_gradient(teacher), student))
    if not isinstance(heads, str):
        own, theirs = (jnp.array(side) for side in zip(*heads, strict=True))
        teacher, student = teacher[:, theirs], student[:, own]
    averaged = heads == "mean" or teacher.shape[1] != student.shape[1]
    if on == "scores":
        t, s = (jnp.where(seen, x, 0.0) for x in (teacher, student))
        if averaged:
            t, s = (x.mean(axis=1, keepdims=True) for x in (t, s))
        each = jnp.sum(jnp.square(t - s), axis=-1) / jnp.maximum(seen.sum(axis=-1), 1)
    else:
        t, s = (jax.nn.log_softmax(jnp.where(seen, x, LOWEST), axis=-1) for x in (teacher, student))
        if averaged:
            t, s = (jax.nn.logsumexp(x, axis=1, keepdims=True) - jnp.log(x.shape[1]) for x in (t, s))
        each = kl(t, s)
    return weighed(each.mean(axis=1), tokens, weights)


def check_heads(heads: str | HeadPairs, student: int, teacher: int) -> None:
    """Raises ValueError for head pairs of heads that do not exist, or an unknown way to pair them."""
    if isinstance(heads, str):
        if heads not in ("match", "mean"):
            raise ValueError(f"unknown heads {heads!r}; known: match, mean, or (student, teacher) pairs")
        return
    for s, t in heads:
        if not (0 <= s < student and 0 <= t < teacher):
            raise ValueError(f"head pair ({s}, {t}) does not exist: 0..{student - 1} and 0..{teacher - 1} do")
