"""SparseGPT: pruning in which the weights that stay make up for those that go."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxlm.core import LM, NO_DATA, Masked, SurgeryContext
from jaxlm.methods.calibration import KERNELS, Statistics, calibrate, matrix, per_leaf
from jaxlm.methods.prune.unstructured.masking import Plan, Share
from jaxlm.methods.prune.unstructured.patterns import final_sparsity, keep, parse_pattern
from jaxlm.methods.second_order import BLOCK, BeginGroup, Matrix, inverse_factor, solve_rows


@functools.cache
def mask_chooser(share: float, pattern: str) -> BeginGroup:
    """`(rows, U_ii) -> mask`: keeps the largest `w_ij² / U_ii²`, what removing a weight alone would cost."""

    def choose_mask(rows: Float[Array, "group out"], U_diagonal: Float[Array, "group"]) -> Bool[Array, "group out"]:
        return keep(jnp.square(rows / U_diagonal[:, None]), share, pattern)

    return choose_mask


def prune_row(
    mask: Bool[Array, "group out"], index: jax.Array, row: Float[Array, "out"], row_data: Any
) -> tuple[Float[Array, "out"], Bool[Array, "out"]]:
    """A row with what its mask drops set to 0, and its mask."""
    return jnp.where(mask[index], row, 0), mask[index]


def sparsegpt_matrix(
    W: Matrix, U: Float32[Array, "in in"], sparsity: float | None, pattern: str = "unstructured", block: int = BLOCK
) -> tuple[Float32[Array, "in out"], Bool[Array, "in out"]]:
    """Pruned weights and their mask.

    The mask is chosen during the solve, from weights that earlier inputs have moved already: for each block of inputs,
    or under `N:M` for each group of M.

    >>> w, mask = sparsegpt_matrix(jnp.array([[1.0], [3.0]]), jnp.eye(2), 0.5)
    >>> w.tolist(), mask.tolist()
    ([[0.0], [3.0]], [[False], [True]])

    Args:
      W: float32.
      U: see `inverse_factor`.
    """
    share = final_sparsity(sparsity, pattern, "sparsegpt")
    group = parse_pattern(pattern).group or block
    return solve_rows(
        W,
        U,
        begin_group=mask_chooser(share, pattern),
        solve_row=prune_row,
        group=group,
        block=max(block // group, 1) * group,
    )


def sparsegpt(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    damping: float = 0.01,
    targets: str = KERNELS,
) -> LM:
    """Surgery: prunes every target and moves the weights that stay so that its outputs change least.

    Results are `Masked` leaves, as `wanda`'s. Source: Frantar and Alistarh 2023, arXiv:2301.00774.

    When: zeros without training, for a smaller file or for hardware that skips 2:4; it lost least of the three that
    were measured.

    Args:
      sparsity: share of zeros in [0, 1), that of every block of 128 inputs, one number or rules
        `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, or `N:M` (N kept of M inputs).
      damping: λ as a share of the mean of H's diagonal.
      targets: regex over paths.
    """
    if pattern.startswith("block"):
        raise ValueError(
            f"sparsegpt: the pattern {pattern!r} does not go with a solve of one input after the other; use "
            f"unstructured or N:M, or prune blocks with wanda"
        )

    plan = Plan("sparsegpt", sparsity, pattern, "output", targets)
    plan.check(lm.params)

    def change(path: str, leaf: Any, statistics: Statistics) -> Masked:
        assert statistics.hessian is not None
        W = jnp.where(statistics.square[:, None] > 0, matrix("sparsegpt", path, leaf), 0)
        U = inverse_factor(statistics.hessian, damping, "sparsegpt", path)
        pruned, mask = sparsegpt_matrix(W, U, plan.share(path), pattern)
        return Masked(pruned.astype(leaf.dtype), mask)

    return calibrate(lm, context, per_leaf(change), who="sparsegpt", targets=targets, hessian=True)
