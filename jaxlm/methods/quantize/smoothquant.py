"""SmoothQuant: activation outliers moved into the weights, before both are quantized."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlm.core import LM, NO_DATA, SurgeryContext, materialize
from jaxlm.methods.calibration import Group, calibrate
from jaxlm.methods.quantize.input_scaling import rescaled

AFTER_NORMS = r".*layers_\d+/(attention/(query|key|value)|cross_attention/query|mlp/(gate_proj|up))/kernel"
"""Products that read the residual stream, where the outliers are."""


def smooth_scale(
    largest_input: Float[Array, "in"], largest_weight: Float[Array, "in"], alpha: float
) -> Float32[Array, "in"]:
    """`s_j = max|X_j|^α / max|W_j|^{1-α}` of every input j; 1 where either is 0.

    With α = ½ inputs and rows have the same range afterwards.

    >>> smooth_scale(jnp.array([16.0, 0.0]), jnp.array([1.0, 1.0]), 0.5).tolist()
    [4.0, 1.0]
    """
    alive = (largest_input > 0) & (largest_weight > 0)
    x, w = jnp.where(alive, largest_input, 1.0), jnp.where(alive, largest_weight, 1.0)
    return x**alpha / w ** (1 - alpha)


def smoothquant(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    alpha: float = 0.5,
    fold: bool = True,
    targets: str = AFTER_NORMS,
) -> LM:
    """Surgery: divides the inputs of products by `smooth_scale` and multiplies their kernels by it.

    The function stays the same; what gains is `quantize` with quantized activations, after it. Products that share an
    input share `s`. Source: Xiao et al. 2022, arXiv:2211.10438.

    When: activations have outliers, and `quantize` with quantized activations follows.

    Args:
      alpha: how much of the difficulty moves into the weights, in [0, 1].
      fold: fold `1/s` into the norm in front where that is valid; elsewhere, and without, it is an `InputScaled`.
      targets: regex over paths; of products that share an input all are rescaled if one is named.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must be in [0, 1], not {alpha}")

    def rule(group: Group) -> dict[str, Any]:
        rows = [jnp.max(jnp.abs(materialize(leaf)), axis=1) for leaf in group.kernels.values()]
        largest = jnp.max(jnp.stack(rows), axis=0).astype(jnp.float32)
        return rescaled("smoothquant", group, smooth_scale(group.statistics.largest, largest, alpha), fold)

    return calibrate(lm, context, rule, who="smoothquant", targets=targets)
