"""The sweep that SparseGPT and GPTQ share: inputs are settled one after the other, and those to come make up for it.

With `H = XᵀX + λI` the output error of a changed kernel is `‖X(W − Ŵ)‖² = tr((W − Ŵ)ᵀ H (W − Ŵ))`. Settling row i of
`W [in, out]` at `ŵ_i` costs least where the rows after it move by `−U_ij e_i` with `e_i = (w_i − ŵ_i) / U_ii`, where
`H⁻¹ = UᵀU` and U is upper triangular: its row i holds what the inverse of the remaining H would give, so no inverse is
updated on the way.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323; Frantar and Alistarh 2023, SparseGPT, arXiv:2301.00774.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128
"""Inputs whose corrections to the rest of the matrix are collected and applied at once."""
HIGHEST = jax.lax.Precision.HIGHEST
RETRIES = 4


def damped(moment: np.ndarray, damping: float) -> np.ndarray:
    """`H + λI`, λ the share `damping` of the mean of H's diagonal; an input that is always 0 gets that mean itself.

    >>> damped(np.diag([2.0, 0.0, 4.0]), 0.5).diagonal().tolist()
    [3.5, 4.5, 5.5]
    """
    h = np.array(moment, np.float64)
    diagonal = np.diagonal(h)
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else 1.0
    h[np.diag_indices_from(h)] += np.where(alive, 0.0, mean) + damping * mean
    return h


def cholesky(moment: Any, damping: float, who: str, path: str) -> np.ndarray:
    """Lower L with `L Lᵀ = H + λI`, float64; λ grows tenfold, four times at most, while the matrix is not definite.

    Args:
      moment: `H = XᵀX [in, in]`.
      who, path: the method and the parameter, for messages.

    Raises:
      ValueError: naming the parameter, where every input is 0, one is not finite, or no λ helps.
    """
    h = np.asarray(moment, np.float64)
    if not np.isfinite(h).all():
        raise ValueError(f"{who}: the inputs of {path} are not finite on the calibration data")
    if not np.diagonal(h).any():
        raise ValueError(
            f"{who}: every input of {path} is 0 on the calibration data, which say nothing of it; leave it out of the "
            f"targets, or calibrate on other text"
        )
    for retry in range(RETRIES):
        whole = damped(h, max(damping, 1e-8 * (retry > 0)) * 10**retry)
        try:
            factor = np.linalg.cholesky(whole)
        except np.linalg.LinAlgError:
            continue
        if np.diagonal(factor).min() ** 2 > 1e-10 * np.diagonal(whole).mean():  # else the pivots are noise
            return factor
    raise ValueError(
        f"{who}: the second moments of the inputs of {path} have no Cholesky factor, not even with {RETRIES - 1} times "
        f"tenfold damping = {damping}; raise the damping, or calibrate on more samples"
    )


def inverse_factor(moment: Any, damping: float, who: str, path: str) -> jax.Array:
    """Upper U with `UᵀU = (H + λI)⁻¹`, float32.

    From the back, `H = R Rᵀ` with R upper, so U is the inverse of R and H is never inverted.

    >>> u = np.asarray(inverse_factor(np.array([[2.0, 1.0], [1.0, 2.0]]), 0.0, "gptq", "w"), np.float64)
    >>> (u.T @ u).round(3).tolist(), float(u[1, 0])
    ([[0.667, -0.333], [-0.333, 0.667]], 0.0)
    """
    from scipy.linalg import solve_triangular

    h = np.asarray(moment, np.float64)
    upper = cholesky(h[::-1, ::-1], damping, who, path)[::-1, ::-1]
    return jnp.asarray(solve_triangular(upper, np.eye(len(upper))), jnp.float32)


@functools.partial(jax.jit, static_argnames=("begin", "settle", "group", "block"))
def sweep(
    w: jax.Array,
    u: jax.Array,
    rows: Any = None,
    *,
    begin: Callable,
    settle: Callable,
    group: int,
    block: int = BLOCK,
) -> tuple[jax.Array, Any]:
    """Settles the rows of `w` in order.

    Args:
      w: `[in, out]` float32; u: `[in, in]`, see `inverse_factor`.
      rows: pytree of arrays `[in, …]`: what `settle` is told of each row besides.
      begin: `(rows of w as they now are [n, out], their U_ii [n]) -> plan`, before each group of n inputs (the last may
        be smaller).
      settle: `(plan, number in the group, row of w as it now is [out], its entry of rows) -> (ŵ_i, output)`.
      group: inputs with a common plan; block: a multiple of it.

    Returns:
      `Ŵ [in, out]`, and the outputs of `settle`, stacked `[in, …]`.
    """
    inputs = len(w)
    whole = inputs // block * block

    def one_block(w, start):
        own = jax.lax.dynamic_slice_in_dim(w, start, block)
        factor = jax.lax.dynamic_slice_in_dim(u, start, block)
        told = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, block), rows)
        settled, errors, out = _block(
            own,
            jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1),
            told,
            begin,
            settle,
            group,
        )
        later = jnp.where(jnp.arange(inputs) >= start + block, factor, 0)
        w = w - jnp.matmul(later.T, errors, precision=HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(w, settled, start, axis=0), out

    parts = []
    if whole:
        w, out = jax.lax.scan(one_block, w, jnp.arange(0, whole, block))
        parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out))
    if whole < inputs:
        told = jax.tree.map(lambda a: a[whole:], rows)
        settled, _, out = _block(w[whole:], u[whole:, whole:], told, begin, settle, group)
        w = w.at[whole:].set(settled)
        parts.append(out)
    return w, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _block(w: jax.Array, u: jax.Array, rows: Any, begin: Callable, settle: Callable, group: int):
    """The rows of one block: settled, their errors `e`, and the outputs."""
    diagonal = jnp.diagonal(u)

    def one_group(state, start, size):
        plan = begin(
            jax.lax.dynamic_slice_in_dim(state[0], start, size), jax.lax.dynamic_slice_in_dim(diagonal, start, size)
        )

        def one_row(state, k):
            w, errors = state
            i = start + k
            settled, out = settle(plan, k, w[i], jax.tree.map(lambda a: a[i], rows))
            error = (w[i] - settled) / diagonal[i]
            w = (w - u[i][:, None] * error).at[i].set(settled)
            return (w, errors.at[i].set(error)), out

        return jax.lax.scan(one_row, state, jnp.arange(size))

    state, parts, size = (w, jnp.zeros_like(w)), [], len(w)
    whole = size // group * group
    if whole:
        state, out = jax.lax.scan(lambda s, start: one_group(s, start, group), state, jnp.arange(0, whole, group))
        parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out))
    if whole < size:
        state, out = one_group(state, whole, size - whole)
        parts.append(out)
    return *state, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
