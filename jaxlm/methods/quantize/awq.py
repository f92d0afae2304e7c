"""AWQ: quantization after the inputs that are large have been given finer steps."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlm.core import LM, NO_DATA, InputScaled, Masked, Quantized, SurgeryContext
from jaxlm.core.weights.scheme import Scheme, from_codes, grid, to_codes
from jaxlm.methods.calibration import KERNELS, Group, calibrate, matrix
from jaxlm.methods.quantize.input_scaling import rescaled
from jaxlm.methods.second_order import Matrix


def power_scale(mean: Float32[Array, "in"], alpha: float | Float[Array, ""]) -> Float32[Array, "in"]:
    """`s = mean|X|^α`, divided by `√(min s · max s)`; inputs that are always 0 count as the smallest that is not.

    >>> power_scale(jnp.array([4.0, 1.0, 0.0]), 0.5).tolist()
    [1.4142135381698608, 0.7071067690849304, 0.7071067690849304]
    """
    alive = mean > 0
    least = jnp.min(jnp.where(alive, mean, jnp.inf))
    s = jnp.where(alive, mean, jnp.where(jnp.isfinite(least), least, 1.0)) ** alpha
    return s / jnp.sqrt(jnp.min(s) * jnp.max(s))


def output_error(W: Matrix, H: Float[Array, "in in"], scale: Float[Array, "in"], scheme: Scheme) -> Float[Array, ""]:
    """`‖X(W − diag(1/s) q(diag(s) W))‖² = tr(Δᵀ H Δ)`: what quantizing the rescaled matrix costs, on the inputs."""
    rescaled_W = scale[:, None] * W
    steps, zero = grid(rescaled_W, scheme)
    quantized = from_codes(to_codes(rescaled_W, steps, zero, scheme), steps, zero, scheme)
    change = W - quantized / scale[:, None]
    return jnp.sum(change * jnp.matmul(H, change, precision=jax.lax.Precision.HIGHEST))


@functools.partial(jax.jit, static_argnames=("scheme", "steps"))
def awq_scale(
    kernels: Sequence[Float32[Array, "in _"]],
    mean: Float32[Array, "in"],
    H: Float32[Array, "in in"],
    scheme: Scheme,
    steps: int = 20,
) -> tuple[Float32[Array, "in"], Float32[Array, ""]]:
    """The `power_scale` whose quantization costs least over all kernels that read the input, and its α.

    α runs over `0, 1/steps, … 1`, so the cost is never above that of round to nearest (α = 0). It is that of the
    products themselves; the original searches with the output of the whole sublayer, which XᵀX cannot give.

    Args:
      mean: of `|X|`; H: `XᵀX`.
    """

    def cost(alpha: Float32[Array, ""]) -> Float32[Array, ""]:
        scale = power_scale(mean, alpha)
        return sum((output_error(W, H, scale, scheme) for W in kernels), jnp.zeros(()))

    alphas = jnp.arange(steps + 1) / steps
    best = alphas[jnp.argmin(jax.lax.map(cost, alphas))]
    return power_scale(mean, best), best


def awq(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    bits: str = "int4",
    group: int | str | None = 128,
    symmetric: bool = True,
    steps: int = 20,
    fold: bool = True,
    rounded: bool = True,
    targets: str = KERNELS,
) -> LM:
    """Surgery: rescales every group of products as `awq_scale` finds best, then rounds its targets to nearest.

    Source: Lin et al. 2023, arXiv:2306.00978, without the search for clipping.

    When: four bits and fewer, where the sweep of `gptq` takes too long; where it was measured it gained nothing
    over round to nearest.

    Args:
      bits, group, symmetric: the number format, see `Scheme`.
      steps: values of α that are tried besides 0.
      fold: fold `1/s` into the norm in front where that is valid; elsewhere, and without, it is an `InputScaled`.
      rounded: quantize; `False` leaves the same function in floats, rescaled for a quantization after it (`gptq`).
      targets: regex over paths; products that share an input share `s`, whether they are targets or not.

    Returns:
      the model with Quantized leaves, some in an InputScaled.
    """
    scheme = Scheme(bits, group, symmetric)

    def store(leaf: Any) -> Any:
        if isinstance(leaf, InputScaled | Masked):
            return leaf.replace(base=store(leaf.base))
        return Quantized.of(leaf, scheme)

    def rule(group: Group) -> dict[str, Any]:
        kernels = {name: matrix("awq", f"{group.layer}/{name}", leaf) for name, leaf in group.kernels.items()}
        chosen = [kernel for name, kernel in kernels.items() if name in group.chosen]
        H = group.statistics.hessian
        assert H is not None
        scale, _ = awq_scale(chosen, group.statistics.mean, H, scheme, steps)
        leaves = rescaled("awq", group, scale, fold)
        return {name: store(leaf) if rounded and name in group.chosen else leaf for name, leaf in leaves.items()}

    return calibrate(lm, context, rule, who="awq", targets=targets, hessian=True)
