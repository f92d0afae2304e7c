"""Magnitude pruning: the smallest weights go, while training or at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import LM, NO_DATA, Masked, Method, SurgeryContext, materialize
from jaxlm.methods.calibration import KERNELS
from jaxlm.methods.prune.unstructured.masking import Plan, Share, by_score, prune_at_once, pruning


def size(leaf: Masked) -> Float[Array, "*layers in out"]:
    """`|W|` of every entry, masked or not."""
    return jnp.abs(materialize(leaf.base))


def magnitude(
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    per: str = "matrix",
    begin: int = 0,
    end: int,
    every: int = 10,
    targets: str = KERNELS,
) -> Method:
    """Masks the smallest weights of every target, by the cubic schedule from step `begin` to `end`.

    An entry that is masked is zero and stays so. Baking stores the zeros in a plain array. Source: Zhu and Gupta 2017,
    arXiv:1710.01878.

    When: zeros are wanted for a smaller file and there is a training run to spread the cut over. They are
    multiplied like any other number: nothing gets faster.

    Args:
      sparsity: final share of zeros, one number or rules `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, `N:M` (N kept of M inputs) or `block:RxC`.
      per: what the share is counted over, `matrix`, `output` or `model`; see `masking.Plan`.
      begin, end: first and last step of the schedule, equal for one-shot; every: steps between two new masks.
      targets: regex over paths.
    """
    plan = Plan("magnitude", sparsity, pattern, per, targets, begin=begin, end=end, every=every)
    return pruning(plan, by_score(plan, size))


def prune_magnitude(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    per: str = "matrix",
    targets: str = KERNELS,
) -> LM:
    """Surgery: masks the smallest weights of every target at once.

    The leaves are Masked, so that the zeros survive the training that follows; the surgery `bake` leaves plain arrays.

    Source: Han et al. 2015, arXiv:1506.02626.

    When: zeros are wanted at once and there is no data; with calibration data `sparsegpt` loses less.

    Args:
      sparsity: final share of zeros, one number or rules `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, `N:M` (N kept of M inputs) or `block:RxC`.
      per: what the share is counted over, `matrix`, `output` or `model`; see `masking.Plan`.
      targets: regex over paths.

    Returns:
      the model with Masked leaves.
    """
    plan = Plan("magnitude", sparsity, pattern, per, targets)
    return lm.replace(params=prune_at_once(plan, size, lm.params))
