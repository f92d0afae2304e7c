"""Dot-product attention as a pure function, with a gradient of its own.

Differentiated as it stands, `softmax(q kᵀ) v` keeps or computes anew a matrix `[queries, keys]` a head for every step
of the softmax, and sums over one of them. What is kept here are the output and, for each query, the largest score and
the sum of the exponentials; the sum that the gradient of the softmax needs is taken over the output, which is shorter.
Of a long row one block of queries after the other is taken, so that no head's whole matrix `[queries, keys]` exists.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.core import Context, dropout, kept

BLOCK = 256
"""Queries that are taken together at most: enough for a product to run at full speed, few enough for its result to
stay in a cache."""


def scores(q: jax.Array, k: jax.Array, bias: jax.Array | None, seen: jax.Array) -> jax.Array:
    """`q kᵀ + bias` in float32, the lowest number of float32 where a key is not seen.

    Args:
      q: `[batch, queries, kv_heads, q_per_kv, head_dim]`; k: `[batch, keys, kv_heads, head_dim]`.
      bias: `[1 or batch, kv_heads, q_per_kv, queries, keys]`; seen: bool `[batch, queries, keys]`.

    Returns:
      `[batch, kv_heads, q_per_kv, queries, keys]`.
    """
    found = _product(_heads_first(q), _heads_first(k), (4,), (3,))
    if bias is not None:
        found = found + bias
    return jnp.where(seen[:, None, None], found, jnp.finfo(jnp.float32).min)


def _heads_first(a: jax.Array) -> jax.Array:
    """`[batch, length, …, head_dim]` to `[batch, …, length, head_dim]`: a row of a head is moved as a whole."""
    return jnp.moveaxis(a, 1, -2)


def _heads_last(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, -2, 1)


def _product(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
    """Each batch entry's and KV head's own product over the named axes, in float32.

    Written out, because an einsum may exchange its sides, and the result is then turned entry by entry.
    """
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


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

    Args:
      rate: of dropout, drawn with `key`; `None` for a deterministic pass.
      q, bias, seen: as in `scores`; k, v: `[batch, keys, kv_heads, head_dim]`.
    """
    queries, blocks = q.shape[1], -(-q.shape[1] // BLOCK)
    if blocks == 1:
        return _attention(rate, q, k, v, bias, seen, key)
    size = -(-queries // blocks)
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)  # so that the blocks' gradients add up in float32

    def split(a: jax.Array, axis: int) -> jax.Array:
        """`[blocks, …, size, …]`; the last block is filled with queries that see nothing."""
        a = jnp.pad(a, [(0, blocks * size - queries if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(a.reshape(*a.shape[:axis], blocks, size, *a.shape[axis + 1 :]), axis, 0)

    def attention(block: tuple) -> jax.Array:
        number, q, bias, seen = block
        k, v = wide_k.astype(q.dtype), wide_v.astype(q.dtype)
        return _attention(rate, q, k, v, bias, seen, None if key is None else jax.random.fold_in(key, number))

    each = (jnp.arange(blocks), split(q, 1), None if bias is None else split(bias, 3), split(seen, 1))
    out = jnp.moveaxis(jax.lax.map(attention, each), 0, 1)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :queries]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rate, q, k, v, bias, seen, key):
    """One block.

    With P the probabilities, P' those that dropout left, O = P' V and the cotangent G of O, the gradient of the scores
    is `P' ∘ (G Vᵀ) - P ∘ r` with `r = Σ_keys P' ∘ (G Vᵀ) = Σ_dims G ∘ O`.

    Source of r: Dao et al., "FlashAttention", 2022, appendix B.2.
    """
    return _forward(rate, q, k, v, bias, seen, key)[0]


def _forward(rate, q, k, v, bias, seen, key):
    found = scores(q, k, bias, seen)
    top = jnp.max(found, -1, keepdims=True)
    weights = jnp.exp(found - top)
    total = jnp.sum(weights, -1, keepdims=True)
    left = dropout((weights / total).astype(q.dtype), rate, Context(key))
    out = _heads_last(_product(left, _heads_first(v), (4,), (2,)).astype(q.dtype))
    out = kept(out.reshape(*out.shape[:2], -1)).reshape(out.shape)
    top, total = kept(top), kept(total)
    return out, (q, k, v, bias, seen, key, out, top, total)


def _backward(rate, residuals, g):
    q, k, v, bias, seen, key, out, top, total = residuals
    probabilities = jnp.exp(scores(q, k, bias, seen) - top) / total
    left = dropout(probabilities.astype(q.dtype), rate, Context(key))
    row = jnp.einsum("bqkgd,bqkgd->bqkg", g, out, precision="highest", preferred_element_type=jnp.float32)
    q, k, v, g, row = map(_heads_first, (q, k, v, g, row[..., None]))
    of_scores = left * _product(g, v, (4,), (3,)) - probabilities * row
    of_scores = jnp.where(seen[:, None, None], of_scores, 0)
    of_bias = None if bias is None else of_scores.sum(0, keepdims=True) if bias.shape[0] == 1 else of_scores
    of_scores = of_scores.astype(q.dtype)
    of_q = _heads_last(_product(of_scores, k, (4,), (2,)).astype(q.dtype))
    # […, head_dim, keys]: a left side that is summed over its rows is turned first, so it is the narrow one.
    of_k, of_v = (_product(a, b, (2, 3), (2, 3)).astype(q.dtype) for a, b in ((q, of_scores), (g, left)))
    return of_q, jnp.moveaxis(of_k, -1, 1), jnp.moveaxis(of_v, -1, 1), of_bias, None, None


_attention.defvjp(_forward, _backward)
