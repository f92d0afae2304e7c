"""Learning how a teacher relates tokens to each other: relations of queries, keys and values (MiniLMv2)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.core import Term
from jaxlm.losses.divergence import LOWEST, kl
from jaxlm.losses.weighting import weighed

NARROWEST = 8
"""Least width of a relation head that is chosen unasked: that of 48 heads over a student of 384, as in the paper."""


def relation_distance(
    teacher: jax.Array, student: jax.Array, segments: jax.Array, heads: int, weights: jax.Array | None = None
) -> Term:
    """`KL(R_teacher‖R_student)`, a mean over relation heads, for every token, with `R = softmax(A Aᵀ / √d_r)`.

    A holds the queries (or keys, or values) of all heads side by side, cut anew into `heads` relation heads of width
    `d_r`, which both models then have, whatever heads they have. A token relates to the tokens of its own segment.
    Source: Wang et al. 2021, MiniLMv2, arXiv:2012.15828.

    Args:
      teacher, student: `[batch, length, heads, head_dim]` of either model.
      segments: int `[batch, length]`, 0 for padding, whose content is not looked at.
      heads: number of relation heads.
      weights: of samples or tokens, see `weighed`.
    """
    tokens = segments > 0
    seen = (segments[:, :, None] == segments[:, None, :]) & tokens[:, :, None]

    def relations(x: jax.Array) -> jax.Array:
        x = jnp.where(tokens[..., None, None], x.astype(jnp.float32), 0.0).reshape(*x.shape[:2], heads, -1)
        scores = jnp.einsum("bqrd,bkrd->brqk", x, x) / math.sqrt(x.shape[-1])
        return jax.nn.log_softmax(jnp.where(seen[:, None], scores, LOWEST), axis=-1)

    each = kl(relations(jax.lax.stop_gradient(teacher)), relations(student))
    return weighed(each.mean(axis=1), tokens, weights)


def relation_heads(widths: Sequence[int], asked: int | None = None) -> int:
    """A number of relation heads that divides all widths: the one asked for, or the largest of width 8 or more.

    Raises:
      ValueError: when the number asked for does not divide a width.

    >>> relation_heads([768, 384])
    48
    """
    common = math.gcd(*widths)
    if asked is None:
        return max(r for r in range(1, common + 1) if common % r == 0 and (r == 1 or min(widths) // r >= NARROWEST))
    if asked < 1 or common % asked:
        raise ValueError(
            f"{asked} relation heads do not divide queries, keys and values of widths {', '.join(map(str, widths))}; "
            f"take a divisor of {common}"
        )
    return asked
