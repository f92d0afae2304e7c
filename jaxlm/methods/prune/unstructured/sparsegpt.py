"""SparseGPT: pruning in which the weights that stay make up for those that go."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Axes, Masked, Tree
from jaxlm.methods.calibration import KERNELS, Calibration, Statistics, calibrate, each, matrix
from jaxlm.methods.prune.unstructured.masking import Plan, Share
from jaxlm.methods.prune.unstructured.patterns import final_sparsity, keep, parse_pattern
from jaxlm.methods.second_order import BLOCK, inverse_factor, sweep


@functools.cache
def mask_of(share: float, pattern: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(rows, U_ii) -> mask`: keeps the largest `w_ij² / U_ii²`, what removing a weight alone would cost."""
    return lambda rows, diagonal: keep(jnp.square(rows / diagonal[:, None]), share, pattern)


def settle(mask: jax.Array, number: jax.Array, row: jax.Array, rows: Any) -> tuple[jax.Array, jax.Array]:
    """A row with what its mask drops set to 0."""
    return jnp.where(mask[number], row, 0), mask[number]


def sparsegpt_matrix(
    w: jax.Array, u: jax.Array, sparsity: float | None, pattern: str = "unstructured", block: int = BLOCK
) -> tuple[jax.Array, jax.Array]:
    """Pruned weights and their mask.

    The mask is chosen during the sweep, from weights that earlier inputs have moved already: for each block of inputs,
    or under `N:M` for each group of M.

    >>> w, mask = sparsegpt_matrix(jnp.array([[1.0], [3.0]]), jnp.eye(2), 0.5)
    >>> w.tolist(), mask.tolist()
    ([[0.0], [3.0]], [[False], [True]])

    Args:
      w: `[in, out]` float32; u: `[in, in]` (`inverse_factor`).
    """
    found, share = parse_pattern(pattern), final_sparsity(sparsity, pattern, "sparsegpt")
    group = found.group or block
    begin, whole = mask_of(share, pattern), max(block // group, 1) * group
    return sweep(w, u, begin=begin, settle=settle, group=group, block=whole)


def sparsegpt(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    calibration: Calibration,
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    damping: float = 0.01,
    targets: str = KERNELS,
):
    """Surgery: prunes every target and moves the weights that stay so that its outputs change least.

    Results are `Masked` leaves, as `wanda`'s. Source: Frantar and Alistarh 2023, arXiv:2301.00774.

    Args:
      model, params, axes: the model, canonical view.
      calibration: text, from `config.calibration`.
      sparsity: share of zeros in [0, 1), that of every block of 128 inputs, one number or rules
        `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, or `N:M` (N kept of M inputs).
      damping: λ as a share of the mean of H's diagonal.
      targets: regex over paths.
    """
    if pattern.startswith("block"):
        raise ValueError(
            f"sparsegpt: the pattern {pattern!r} has no place in a sweep over single inputs; use unstructured or N:M, "
            f"or prune blocks with wanda"
        )

    plan = Plan("sparsegpt", sparsity, pattern, "output", targets)
    plan.check(params)

    def change(path: str, leaf: Any, statistics: Statistics) -> Masked:
        w = jnp.where(statistics.square[:, None] > 0, matrix("sparsegpt", path, leaf), 0)
        u = inverse_factor(statistics.moment, damping, "sparsegpt", path)
        settled, mask = sparsegpt_matrix(w, u, plan.share(path), pattern)
        return Masked(settled.astype(leaf.dtype), mask)

    return (
        model,
        calibrate(model, params, calibration, each(change), who="sparsegpt", targets=targets, moment=True),
        axes,
    )
