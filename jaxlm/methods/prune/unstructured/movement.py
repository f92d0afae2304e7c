"""Movement pruning: entries go whose weight training moves towards zero."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlm.core import Method, materialize
from jaxlm.methods.calibration import KERNELS
from jaxlm.methods.prune.unstructured.masking import Plan, Share, by_score, pruning
from jaxlm.methods.prune.unstructured.scored import Scored


def movement(
    *,
    sparsity: Share = None,
    pattern: str = "unstructured",
    per: str = "matrix",
    learning_rate: float = 1.0,
    prior: float = 0.0,
    begin: int = 0,
    end: int,
    every: int = 10,
    targets: str = KERNELS,
) -> Method:
    """Masks the entries with the smallest `S + prior · |W|`, where scores S are learned by the loss itself.

    With `W′ = W ⊙ M(S)` and the gradient passed straight through the choice of the mask, `∂L/∂S = (∂L/∂W′) ⊙ W`, and
    `S ← S - η (∂L/∂W′) ⊙ W` from `S = 0`, by gradient descent of its own: a constant rate, no momentum, no decay. So a
    score grows while a weight moves away from zero. The gradient is that of masked entries, too; they keep the value
    that they had, are zero in the forward pass, and may come back. Source: Sanh et al. 2020, arXiv:2005.07683.

    When: a pretrained model is fine-tuned for long while most of its weights go; in short training it loses far
    more than `magnitude`.

    Args:
      sparsity: final share of zeros, one number or rules `((path regex, share), …)`; `None` under an `N:M` pattern.
      pattern: `unstructured`, `N:M` (N kept of M inputs) or `block:RxC`.
      per: what the share is counted over, `matrix`, `output` or `model`; see `masking.Plan`.
      learning_rate: η; only its ratio to `prior` matters for the masks.
      prior: how much magnitude counts beside movement; 0 is the method of the paper.
      begin, end: first and last step of the schedule, equal for one-shot; every: steps between two new masks.
      targets: regex over paths; they have to train.
    """
    if learning_rate <= 0 or prior < 0:
        raise ValueError(f"movement: learning_rate {learning_rate} must be positive, and prior {prior} not negative")
    plan = Plan("movement", sparsity, pattern, per, targets, begin=begin, end=end, every=every)

    def learn(
        scores: Float32[Array, "*layers in out"],
        weight: Float[Array, "*layers in out"],
        gradient: Float[Array, "*layers in out"],
    ) -> Float32[Array, "*layers in out"]:
        return scores - learning_rate * (weight * gradient).astype(jnp.float32)

    def score(leaf: Scored) -> Float32[Array, "*layers in out"]:
        return leaf.scores + prior * jnp.abs(materialize(leaf.base))

    return pruning(plan, by_score(plan, score, may_return=True), learn=learn, dense=True, hold=True)
