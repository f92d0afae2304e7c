"""Wanda: pruning by weight times the norm of its input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.core import LM, NO_DATA, FakeQuant, Masked, SurgeryContext, Weight, lookup, materialize
from jaxlm.methods.calibration import KERNELS, Statistics, calibrate, per_leaf
from jaxlm.methods.prune.unstructured.masking import Plan, Share
from jaxlm.methods.prune.unstructured.patterns import keep


@functools.partial(jax.jit, static_argnames=("sparsity", "pattern", "per"))
def wanda_mask(
    w: Float[Array, "in out"],
    norm: Float[Array, "in"],
    sparsity: float | None,
    pattern: str = "unstructured",
    per: str = "output",
) -> Bool[Array, "in out"]:
    """The mask that keeps the largest `|W_ij| · ‖X_i‖₂`, ranked in each output (column j) apart.

    >>> w = jnp.array([[3.0, 1.0], [2.0, -4.0]])
    >>> wanda_mask(w, jnp.array([1.0, 2.0]), 0.5).tolist()
    [[False, False], [True, True]]
    """
    return keep(jnp.abs(w) * norm[:, None], sparsity, pattern, per)


def wanda(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    per: str = "output",
    targets: str = KERNELS,
) -> LM:
    """Surgery: masks the weights with the smallest `|W_ij| · ‖X_i‖₂`; the others stay as they are.

    The inputs X are those behind the layers that are pruned already. Results are `Masked` leaves, the zeros stored as
    zeros: training afterwards leaves them zero, and the surgery `bake` makes plain arrays of them.
    Source: Sun et al. 2023, arXiv:2306.11695.

    When: zeros in one pass, without the solve of `sparsegpt`, which loses less; with `per="matrix"` for small
    models.

    Args:
      sparsity: share of zeros in [0, 1), one number or rules `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, `N:M` (N kept of M inputs), `block:RxC`.
      per: `output`: each column keeps its own share; `matrix`: all of them together. There is no budget over all
        matrices: what a layer reads depends on what is gone from those before it.
      targets: regex over paths.
    """
    lookup({"output": "output", "matrix": "matrix"}, per, "wanda: per")
    plan = Plan("wanda", sparsity, pattern, per, targets)
    plan.check(lm.params)

    def change(path: str, leaf: Any, statistics: Statistics) -> Any:
        share = plan.share(path)
        return pruned(leaf, wanda_mask(materialize(leaf), statistics.norm, share, pattern=pattern, per=per))

    return calibrate(lm, context, per_leaf(change), who="wanda", targets=targets)


def pruned(leaf: Any, mask: Bool[Array, "in out"]) -> Any:
    """`leaf` under a mask: an array with its zeros in place; a FakeQuant stays outside."""
    if isinstance(leaf, FakeQuant):
        return leaf.replace(base=pruned(leaf.base, mask))
    base = leaf.base if isinstance(leaf, Masked) else leaf
    return Masked(base if isinstance(base, Weight) else jnp.where(mask, base, jnp.zeros((), base.dtype)), mask)
