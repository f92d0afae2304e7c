"""Pruning by gradient times weight: what the loss would lose, to first order, if an entry were zero."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlm.core import Method
from jaxlm.methods.calibration import KERNELS
from jaxlm.methods.prune.unstructured.masking import Plan, Share, by_score, pruning


def taylor(
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    per: str = "matrix",
    smoothing: float = 0.9,
    begin: int = 0,
    end: int,
    every: int = 10,
    targets: str = KERNELS,
) -> Method:
    """Masks the entries with the smallest `S`, a running mean of `|W ⊙ ∂L/∂W|`: `S ← β S + (1 - β) |W ⊙ ∂L/∂W|`.

    The loss with `W_ij` set to zero is `L - W_ij ∂L/∂W_ij` to first order. An entry that is masked stays so. Sources:
    Molchanov et al. 2016, arXiv:1611.06440; one-shot before training it is SNIP, Lee et al. 2018, arXiv:1810.02340.

    When: zeros are chosen while training goes on, and gradients should decide and not size; where both were
    measured, `magnitude` did as well.

    Args:
      sparsity: final share of zeros, one number or rules `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, `N:M` (N kept of M inputs) or `block:RxC`.
      per: what the share is counted over, `matrix`, `output` or `model`; see `masking.Plan`.
      smoothing: β; 0 scores by the last batch alone.
      begin, end: first and last step of the schedule, equal for one-shot; every: steps between two new masks.
      targets: regex over paths; they have to train.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"taylor: smoothing must be in [0, 1), not {smoothing}")
    plan = Plan("taylor", sparsity, pattern, per, targets, begin=begin, end=end, every=every)

    def learn(
        scores: Float32[Array, "*layers in out"],
        weight: Float[Array, "*layers in out"],
        gradient: Float[Array, "*layers in out"],
    ) -> Float32[Array, "*layers in out"]:
        return smoothing * scores + (1 - smoothing) * jnp.abs(weight * gradient).astype(jnp.float32)

    return pruning(plan, by_score(plan, lambda leaf: leaf.scores), learn=learn)
