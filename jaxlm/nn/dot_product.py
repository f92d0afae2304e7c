"""Dot-product attention as a pure function, with a gradient of its own.

Differentiated as it stands, `softmax(q kᵀ) v` keeps or computes anew a matrix `[queries, keys]` a head for every step
of the softmax, and sums over one of them. What is kept here are the output and, for each query, the largest score and
the sum of the exponentials; the sum that the gradient of the softmax needs is taken over the output, which is shorter.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.core import PRODUCT, Context, dropout


def scores(q: jax.Array, k: jax.Array, bias: jax.Array | None, seen: jax.Array) -> jax.Array:
    """`q kᵀ + bias` in float32, the lowest number of float32 where a key is not seen.

    Args:
      q: `[batch, queries, kv_heads, q_per_kv, head_dim]`; k: `[batch, keys, kv_heads, head_dim]`.
      bias: `[1 or batch, kv_heads, q_per_kv, queries, keys]`; seen: bool `[batch, queries, keys]`.

    Returns:
      `[batch, kv_heads, q_per_kv, queries, keys]`.
    """
    found = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        found = found + bias
    return jnp.where(seen[:, None, None], found, jnp.finfo(jnp.float32).min)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot_product_attention(
    rate: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    seen: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """`dropout(softmax(scores)) v`, `[batch, queries, kv_heads, q_per_kv, head_dim]` in the dtype of `q`.

    With P the probabilities, P' those that dropout left, O = P' V and the cotangent G of O, the gradient of the scores
    is `P' ∘ (G Vᵀ) - P ∘ r` with `r = Σ_keys P' ∘ (G Vᵀ) = Σ_dims G ∘ O`.

    Source of r: Dao et al., "FlashAttention", 2022, appendix B.2.

    Args:
      rate: of dropout, drawn with `key`; `None` for a deterministic pass.
      q, bias, seen: as in `scores`; k, v: `[batch, keys, kv_heads, head_dim]`.
    """
    return _forward(rate, q, k, v, bias, seen, key)[0]


def _forward(rate, q, k, v, bias, seen, key):
    found = scores(q, k, bias, seen)
    top = jnp.max(found, -1, keepdims=True)
    weights = jnp.exp(found - top)
    total = jnp.sum(weights, -1, keepdims=True)
    kept = dropout((weights / total).astype(q.dtype), rate, Context(key))
    out, top, total = (checkpoint_name(a, PRODUCT) for a in (jnp.einsum("bkgqs,bskd->bqkgd", kept, v), top, total))
    return out, (q, k, v, bias, seen, key, out, top, total)


def _backward(rate, residuals, g):
    q, k, v, bias, seen, key, out, top, total = residuals
    probabilities = jnp.exp(scores(q, k, bias, seen) - top) / total
    kept = dropout(probabilities.astype(q.dtype), rate, Context(key))
    row = jnp.sum(g.astype(jnp.float32) * out, -1)
    of_kept = jnp.einsum("bqkgd,bskd->bkgqs", g, v, preferred_element_type=jnp.float32)
    of_scores = kept * of_kept - probabilities * jnp.moveaxis(row, 1, -1)[..., None]
    of_scores = jnp.where(seen[:, None, None], of_scores, 0)
    of_bias = None if bias is None else of_scores.sum(0, keepdims=True) if bias.shape[0] == 1 else of_scores
    of_scores = of_scores.astype(q.dtype)
    of_q = jnp.einsum("bkgqs,bskd->bqkgd", of_scores, k)
    of_k = jnp.einsum("bkgqs,bqkgd->bskd", of_scores, q)
    of_v = jnp.einsum("bkgqs,bqkgd->bskd", kept, g)
    return of_q, of_k, of_v, of_bias, None, None


dot_product_attention.defvjp(_forward, _backward)
