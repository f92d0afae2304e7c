"""The cubic sparsity schedule, and the steps at which masks follow it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Steps = int | Int[Array, ""]


def cubic(
    step: Steps, final: float | Float[Array | np.ndarray, "*shares"], begin: int, end: int, initial: float = 0.0
) -> Float[Array, "*shares"]:
    """`s_f + (s_0 - s_f) (1 - (t - t_0) / (t_1 - t_0))³`, `s_0` before `begin` and `s_f` after `end`.

    Fast at first, when there is much to remove, and slow towards the end. Source: Zhu and Gupta 2017, arXiv:1710.01878.

    >>> [round(float(cubic(t, 0.8, begin=0, end=10)), 3) for t in (0, 5, 10, 99)]
    [0.0, 0.7, 0.8, 0.8]
    """
    if end <= begin:
        return jnp.where(step >= begin, final, initial)
    remaining = 1.0 - jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
    return remaining**3 * (initial - final) + final


def overdue(step: Steps, last: Steps, begin: int, end: int, every: int) -> Bool[Array, ""]:
    """Whether a newer mask is due than that of step `last` (0: none): at `begin`, every `every` steps, and at `end`.

    The update of such a step may be skipped, because a gradient was not finite; the next one then makes up for it, also
    after `end`, where no other would follow.

    >>> [bool(overdue(t, 5, begin=0, end=10, every=5)) for t in (5, 9, 10, 11)]
    [False, False, True, True]
    """
    newest = jnp.where(step >= end, end, begin + (step - begin) // every * every)
    return (step >= begin) & (newest > last)


def check_schedule(who: str, begin: int, end: int, every: int) -> None:
    """Raises ValueError for a schedule that would never prune."""
    if not 1 <= end >= begin >= 0:
        raise ValueError(f"{who}: steps begin={begin} to end={end} are no interval; steps are counted from 1")
    if every < 1:
        raise ValueError(f"{who}: every must be at least 1, not {every}")
