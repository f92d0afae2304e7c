"""Distilling the relations between tokens in queries, keys and values (MiniLMv2)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxlm.core import Term
from jaxlm.losses.divergence import LOWEST, kl
from jaxlm.losses.weighting import SampleWeights, weighted_term

NARROWEST = 8
"""Smallest width of a relation head by default: that of 48 heads over a student of width 384, as in the paper."""


def relation_distance(
    teacher: Float[Array, "batch length teacher_heads teacher_head_dim"],
    student: Float[Array, "batch length student_heads student_head_dim"],
    segments: Int[Array, "batch length"],
    heads: int,
    weights: SampleWeights | None = None,
) -> Term:
    """`KL(R_teacher‖R_student)`, a mean over relation heads, for every token, with `R = softmax(A Aᵀ / √d_r)`.

    A holds the queries (or keys, or values) of all heads concatenated, and split again into `heads` relation heads of
    width `d_r`, the same number for both models, however many heads each has. A token relates to the tokens of its
    segment. Source: Wang et al. 2021, MiniLMv2, arXiv:2012.15828.

    Args:
      segments: 0 for padding, whose content is ignored.
      heads: number of relation heads.
    """
    tokens = segments > 0
    seen = (segments[:, :, None] == segments[:, None, :]) & tokens[:, :, None]

    def relations(x: Float[Array, "batch length _ _"]) -> Float32[Array, "batch heads length length"]:
        x = jnp.where(tokens[..., None, None], x.astype(jnp.float32), 0.0).reshape(*x.shape[:2], heads, -1)
        scores = jnp.einsum("bqrd,bkrd->brqk", x, x) / math.sqrt(x.shape[-1])
        return jax.nn.log_softmax(jnp.where(seen[:, None], scores, LOWEST), axis=-1)

    divergence = kl(relations(jax.lax.stop_gradient(teacher)), relations(student))
    return weighted_term(divergence.mean(axis=1), tokens, weights)


def relation_heads(widths: Sequence[int], heads: int | None = None) -> int:
    """A number of relation heads that divides all widths: `heads`, or the largest whose heads are 8 wide or wider.

    Raises:
      ValueError: when `heads` does not divide a width.

    >>> relation_heads([768, 384])
    48
    """
    common = math.gcd(*widths)
    if heads is None:
        return max(r for r in range(1, common + 1) if common % r == 0 and (r == 1 or min(widths) // r >= NARROWEST))
    if heads < 1 or common % heads:
        raise ValueError(
            f"{heads} relation heads do not divide queries, keys and values of widths {', '.join(map(str, widths))}; "
            f"take a divisor of {common}"
        )
    return heads
