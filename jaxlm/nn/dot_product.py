"""Dot-product attention as a pure function, with a custom gradient.

Differentiated automatically, `softmax(q kᵀ) v` keeps or recomputes a matrix `[queries, keys]` per head for every step
of the softmax, and sums over one of them. Kept here are the output and, for each query, the largest score and the sum
of the exponentials; the sum in the gradient of the softmax is taken over the output, which is shorter. A long row is
processed one block of queries at a time, so that no head's whole matrix `[queries, keys]` ever exists.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.core import Context, dropout, kept

BLOCK = 256
"""Most queries in a block: enough for a product to run at full speed, few enough for its result to stay in cache."""


def scores(q: jax.Array, k: jax.Array, bias: jax.Array | None, mask: jax.Array) -> jax.Array:
    """`q kᵀ + bias` in float32; float32's lowest number where the mask is False.

    Args:
      q: `[batch, queries, kv_heads, q_per_kv, head_dim]`; k: `[batch, keys, kv_heads, head_dim]`.
      bias: `[1 or batch, kv_heads, q_per_kv, queries, keys]`; mask: bool `[batch, queries, keys]`, True where a query
        attends to a key.

    Returns:
      `[batch, kv_heads, q_per_kv, queries, keys]`.
    """
    products = _product(_heads_first(q), _heads_first(k), (4,), (3,))
    if bias is not None:
        products = products + bias
    return jnp.where(mask[:, None, None], products, jnp.finfo(jnp.float32).min)


def _heads_first(a: jax.Array) -> jax.Array:
    """`[batch, length, …, head_dim]` to `[batch, …, length, head_dim]`: rows of `head_dim` numbers move as a whole."""
    return jnp.moveaxis(a, 1, -2)


def _heads_last(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, -2, 1)


def _product(a: jax.Array, b: jax.Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> jax.Array:
    """The product over the given axes for every batch entry and KV head, in float32.

    Not an einsum, which may exchange its operands; its result is then transposed entry by entry.
    """
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def dot_product_attention(
    rate: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """`dropout(softmax(scores)) v`, `[batch, queries, kv_heads, q_per_kv, head_dim]` in the dtype of `q`.

    Args:
      rate: dropout rate of the probabilities; key: draws it, `None` for a deterministic pass.
      q, bias, mask: as in `scores`; k, v: `[batch, keys, kv_heads, head_dim]`.
    """
    queries, blocks = q.shape[1], -(-q.shape[1] // BLOCK)
    if blocks == 1:
        return _attention(rate, q, k, v, bias, mask, key)
    size = -(-queries // blocks)
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)  # so that the blocks' gradients add up in float32

    def split(a: jax.Array, axis: int) -> jax.Array:
        """`[blocks, …, size, …]`; the last block is padded with queries that attend to nothing."""
        a = jnp.pad(a, [(0, blocks * size - queries if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(a.reshape(*a.shape[:axis], blocks, size, *a.shape[axis + 1 :]), axis, 0)

    def attention(block: tuple) -> jax.Array:
        number, q, bias, mask = block
        k, v = wide_k.astype(q.dtype), wide_v.astype(q.dtype)
        return _attention(rate, q, k, v, bias, mask, None if key is None else jax.random.fold_in(key, number))

    operands = (jnp.arange(blocks), split(q, 1), None if bias is None else split(bias, 3), split(mask, 1))
    out = jnp.moveaxis(jax.lax.map(attention, operands), 0, 1)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :queries]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rate, q, k, v, bias, mask, key):
    """Attention of one block of queries.

    With probabilities P, P' after dropout, output O = P' V and its cotangent G, the gradient of the scores is
    `P' ∘ (G Vᵀ) - P ∘ D` with `D = Σ_keys P' ∘ (G Vᵀ) = Σ_dims G ∘ O`.

    Source of D: Dao et al., "FlashAttention", 2022, appendix B.2.
    """
    return _forward(rate, q, k, v, bias, mask, key)[0]


def _forward(rate, q, k, v, bias, mask, key):
    logits = scores(q, k, bias, mask)
    row_max = jnp.max(logits, -1, keepdims=True)
    weights = jnp.exp(logits - row_max)
    row_sum = jnp.sum(weights, -1, keepdims=True)
    dropped = dropout((weights / row_sum).astype(q.dtype), rate, Context(key))
    out = _heads_last(_product(dropped, _heads_first(v), (4,), (2,)).astype(q.dtype))
    out = kept(out.reshape(*out.shape[:2], -1)).reshape(out.shape)
    row_max, row_sum = kept(row_max), kept(row_sum)
    return out, (q, k, v, bias, mask, key, out, row_max, row_sum)


def _backward(rate, residuals, g):
    q, k, v, bias, mask, key, out, row_max, row_sum = residuals
    probabilities = jnp.exp(scores(q, k, bias, mask) - row_max) / row_sum
    dropped = dropout(probabilities.astype(q.dtype), rate, Context(key))
    d = jnp.einsum("bqkgd,bqkgd->bqkg", g, out, precision="highest", preferred_element_type=jnp.float32)
    q, k, v, g, d = map(_heads_first, (q, k, v, g, d[..., None]))
    grad_scores = dropped * _product(g, v, (4,), (3,)) - probabilities * d
    grad_scores = jnp.where(mask[:, None, None], grad_scores, 0)
    grad_bias = None if bias is None else grad_scores.sum(0, keepdims=True) if bias.shape[0] == 1 else grad_scores
    grad_scores = grad_scores.astype(q.dtype)
    grad_q = _heads_last(_product(grad_scores, k, (4,), (2,)).astype(q.dtype))
    # […, head_dim, keys]: a left operand that is summed over its rows is transposed first, so it is the narrow one.
    grad_k, grad_v = (_product(a, b, (2, 3), (2, 3)).astype(q.dtype) for a, b in ((q, grad_scores), (g, dropped)))
    return grad_q, jnp.moveaxis(grad_k, -1, 1), jnp.moveaxis(grad_v, -1, 1), grad_bias, None, None


_attention.defvjp(_forward, _backward)
