"""The second-order solve that SparseGPT and GPTQ share: rows are fixed one after the other, and later ones compensate.

With the Hessian `H = XᵀX + λI` the output error of a changed kernel is `‖X(W − Ŵ)‖² = tr((W − Ŵ)ᵀ H (W − Ŵ))`. Fixing
row i of `W [in, out]` at `ŵ_i` costs least where the rows after it move by `−U_ij err_i` with
`err_i = (w_i − ŵ_i) / U_ii`, where `H⁻¹ = UᵀU` and U is upper triangular (`Hinv` in the papers' code): its row i holds
what the inverse of the remaining H would give, so no inverse is updated on the way.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323; Frantar and Alistarh 2023, SparseGPT, arXiv:2301.00774.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

Matrix = Float[Array | np.ndarray, "in out"]
"""A kernel, numpy's or jax's."""
Hessian = Float[Array | np.ndarray, "in in"]
"""`XᵀX` of the inputs of a kernel, numpy's or jax's."""

BLOCK = 128
"""Inputs whose corrections to the rest of the matrix are collected and applied at once."""
HIGHEST = jax.lax.Precision.HIGHEST
RETRIES = 4


def damped(H: Hessian, damping: float) -> Float64[np.ndarray, "in in"]:
    """`H + λI`, λ the share `damping` of the mean of H's diagonal; an input that is always 0 gets that mean itself.

    >>> damped(np.diag([2.0, 0.0, 4.0]), 0.5).diagonal().tolist()
    [3.5, 4.5, 5.5]
    """
    H = np.array(H, np.float64)
    diagonal = np.diagonal(H)
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else 1.0
    H[np.diag_indices_from(H)] += np.where(alive, 0.0, mean) + damping * mean
    return H


def cholesky(H: Hessian, damping: float, who: str, path: str) -> Float64[np.ndarray, "in in"]:
    """Lower L with `L Lᵀ = H + λI`; λ grows tenfold, three times at most, while the matrix is not definite.

    Args:
      H: `XᵀX`.
      who, path: the method and the parameter, for messages.

    Raises:
      ValueError: naming the parameter, where every input is 0, one is not finite, or no λ helps.
    """
    H = np.asarray(H, np.float64)
    if not np.isfinite(H).all():
        raise ValueError(f"{who}: the inputs of {path} are not finite on the calibration data")
    if not np.diagonal(H).any():
        raise ValueError(
            f"{who}: every input of {path} is 0 on the calibration data, which say nothing of it; leave it out of the "
            f"targets, or calibrate on other text"
        )
    for retry in range(RETRIES):
        definite = damped(H, max(damping, 1e-8 * (retry > 0)) * 10**retry)
        try:
            L = np.linalg.cholesky(definite)
        except np.linalg.LinAlgError:
            continue
        if np.diagonal(L).min() ** 2 > 1e-10 * np.diagonal(definite).mean():  # else the pivots are noise
            return L
    raise ValueError(
        f"{who}: the second moments of the inputs of {path} have no Cholesky factor, not even with {RETRIES - 1} times "
        f"tenfold damping = {damping}; raise the damping, or calibrate on more samples"
    )


def inverse_factor(H: Hessian, damping: float, who: str, path: str) -> Float32[Array, "in in"]:
    """Upper U with `UᵀU = (H + λI)⁻¹`: the Cholesky factor of the inverse.

    From the back, `H = R Rᵀ` with R upper, so U is the inverse of R and H is never inverted.

    >>> u = np.asarray(inverse_factor(np.array([[2.0, 1.0], [1.0, 2.0]]), 0.0, "gptq", "w"), np.float64)
    >>> (u.T @ u).round(3).tolist(), float(u[1, 0])
    ([[0.667, -0.333], [-0.333, 0.667]], 0.0)
    """
    from scipy.linalg import solve_triangular

    H = np.asarray(H, np.float64)
    R = cholesky(H[::-1, ::-1], damping, who, path)[::-1, ::-1]
    return jnp.asarray(solve_triangular(R, np.eye(len(R))), jnp.float32)


class BeginGroup(Protocol):
    """What the rows of a group have in common, read before the first of them is fixed."""

    def __call__(self, rows: Float[Array, "group out"], U_diagonal: Float[Array, "group"], /) -> Any:
        """From the rows as earlier ones have moved them, and their `U_ii`: anything, passed on to `SolveRow`."""


class SolveRow(Protocol):
    """Fixes one row."""

    def __call__(
        self, group: Any, index: Int[Array, ""], row: Float[Array, "out"], row_data: Any, /
    ) -> tuple[Float[Array, "out"], Any]:
        """`ŵ_i`, and an output that is stacked over all rows.

        Args:
          group: what `BeginGroup` gave; index: the number of the row in it.
          row: as earlier rows have moved it.
          row_data: the entry of this row.
        """


@functools.partial(jax.jit, static_argnames=("begin_group", "solve_row", "group", "block"))
def solve_rows(
    W: Float32[Array, "in out"],
    U: Float32[Array, "in in"],
    row_data: Any = None,
    *,
    begin_group: BeginGroup,
    solve_row: SolveRow,
    group: int,
    block: int = BLOCK,
) -> tuple[Float32[Array, "in out"], Any]:
    """Fixes the rows of W in order.

    Args:
      U: see `inverse_factor`.
      row_data: pytree of arrays `[in, …]`: what `solve_row` reads of each row besides.
      group: inputs that `begin_group` sees together (the last group may be smaller).
      block: a multiple of it.

    Returns:
      `Ŵ`, and the outputs of `solve_row`, stacked `[in, …]`.
    """
    inputs = len(W)
    whole = inputs // block * block

    def one_block(W, start):
        rows = jax.lax.dynamic_slice_in_dim(W, start, block)
        U_rows = jax.lax.dynamic_slice_in_dim(U, start, block)
        solved, err, outputs = _solve_block(
            rows,
            jax.lax.dynamic_slice_in_dim(U_rows, start, block, axis=1),
            jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, block), row_data),
            begin_group=begin_group,
            solve_row=solve_row,
            group=group,
        )
        # The rows of all later blocks make up for the errors of this one.
        U_later = jnp.where(jnp.arange(inputs) >= start + block, U_rows, 0)
        W = W - jnp.matmul(U_later.T, err, precision=HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(W, solved, start, axis=0), outputs

    parts = []
    if whole:
        W, outputs = jax.lax.scan(one_block, W, jnp.arange(0, whole, block))
        parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), outputs))
    if whole < inputs:
        solved, _, outputs = _solve_block(
            W[whole:],
            U[whole:, whole:],
            jax.tree.map(lambda a: a[whole:], row_data),
            begin_group=begin_group,
            solve_row=solve_row,
            group=group,
        )
        W = W.at[whole:].set(solved)
        parts.append(outputs)
    return W, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _solve_block(
    W: Float32[Array, "block out"],
    U: Float32[Array, "block block"],
    row_data: Any,
    *,
    begin_group: BeginGroup,
    solve_row: SolveRow,
    group: int,
) -> tuple[Float32[Array, "block out"], Float32[Array, "block out"], Any]:
    """The fixed rows of one block, their errors `err`, and the outputs."""
    diagonal = jnp.diagonal(U)

    def one_group(state, start, size):
        shared = begin_group(
            jax.lax.dynamic_slice_in_dim(state[0], start, size), jax.lax.dynamic_slice_in_dim(diagonal, start, size)
        )

        def one_row(state, index):
            W, errors = state
            i = start + index
            solved, output = solve_row(shared, index, W[i], jax.tree.map(lambda a: a[i], row_data))
            err = (W[i] - solved) / diagonal[i]
            W = (W - U[i][:, None] * err).at[i].set(solved)
            return (W, errors.at[i].set(err)), output

        return jax.lax.scan(one_row, state, jnp.arange(size))

    state, parts, size = (W, jnp.zeros_like(W)), [], len(W)
    whole = size // group * group
    if whole:
        state, outputs = jax.lax.scan(
            lambda state, start: one_group(state, start, group), state, jnp.arange(0, whole, group)
        )
        parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), outputs))
    if whole < size:
        state, outputs = one_group(state, whole, size - whole)
        parts.append(outputs)
    return *state, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
