"""The cubic sparsity schedule."""

import jax
import jax.numpy as jnp


def cubic(step: jax.Array | int, final: float, begin: int, end: int, initial: float = 0.0) -> jax.Array:
    """`s_f + (s_0 - s_f) (1 - (t - t_0) / (t_1 - t_0))³`, `s_0` before `begin` and `s_f` after `end`.

    Fast at first, when there is much to remove, and slow towards the end. Source: Zhu and Gupta 2017, arXiv:1710.01878.

    >>> [round(float(cubic(t, 0.8, begin=0, end=10)), 3) for t in (0, 5, 10, 99)]
    [0.0, 0.7, 0.8, 0.8]
    """
    if end <= begin:
        return jnp.where(step >= begin, final, initial)
    left = 1.0 - jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
    return final + (initial - final) * left**3
