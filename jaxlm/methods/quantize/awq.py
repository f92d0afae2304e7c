"""AWQ: rounding after the inputs that are large have been given finer steps."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Axes, InputScaled, Masked, Quantized, Tree
from jaxlm.core.weights.scheme import Scheme, from_codes, grid, to_codes
from jaxlm.methods.calibration import KERNELS, Calibration, Group, Statistics, calibrate, matrix
from jaxlm.methods.quantize.input_scaling import rescaled


def power_scale(mean: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """`s = mean|X|^α`, divided by `√(min s · max s)`; inputs that are always 0 count as the smallest that is not.

    >>> power_scale(jnp.array([4.0, 1.0, 0.0]), 0.5).tolist()
    [1.4142135381698608, 0.7071067690849304, 0.7071067690849304]
    """
    alive = mean > 0
    least = jnp.min(jnp.where(alive, mean, jnp.inf))
    s = jnp.where(alive, mean, jnp.where(jnp.isfinite(least), least, 1.0)) ** alpha
    return s / jnp.sqrt(jnp.min(s) * jnp.max(s))


def output_error(w: jax.Array, moment: jax.Array, scale: jax.Array, scheme: Scheme) -> jax.Array:
    """`‖X(W − diag(1/s) q(diag(s) W))‖² = tr(Δᵀ XᵀX Δ)`: what rounding the rescaled matrix costs, on the inputs."""
    larger = w * scale[:, None]
    found = grid(larger, scheme)
    change = w - from_codes(to_codes(larger, *found, scheme), *found, scheme) / scale[:, None]
    return jnp.sum(change * jnp.matmul(moment, change, precision=jax.lax.Precision.HIGHEST))


@functools.partial(jax.jit, static_argnames=("scheme", "steps"))
def awq_scale(
    kernels: Sequence[jax.Array], mean: jax.Array, moment: jax.Array, scheme: Scheme, steps: int = 20
) -> tuple[jax.Array, jax.Array]:
    """The `power_scale` whose rounding costs least over all kernels that read the input, and its α.

    α runs over `0, 1/steps, … 1`, so the cost is never above that of plain rounding (α = 0). It is that of the products
    themselves; the original searches with the output of the whole sublayer, which XᵀX cannot give.

    Args:
      kernels: `[in, out_k]`; mean: mean|X| `[in]`; moment: `XᵀX [in, in]`.
    """

    def cost(alpha: jax.Array) -> jax.Array:
        scale = power_scale(mean, alpha)
        return sum((output_error(w, moment, scale, scheme) for w in kernels), jnp.zeros(()))

    candidates = jnp.arange(steps + 1) / steps
    best = candidates[jnp.argmin(jax.lax.map(cost, candidates))]
    return power_scale(mean, best), best


def awq(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    calibration: Calibration,
    *,
    bits: str = "int4",
    group: int | str | None = 128,
    symmetric: bool = True,
    steps: int = 20,
    fold: bool = True,
    rounded: bool = True,
    targets: str = KERNELS,
):
    """Surgery: rescales every group of products as `awq_scale` finds best, then rounds its targets to the nearest code.

    Source: Lin et al. 2023, arXiv:2306.00978, without the search for clipping.

    Args:
      model, params, axes: the model, canonical view.
      calibration: text, from `config.calibration`.
      bits, group, symmetric: the number format, see `Scheme`.
      steps: values of α that are tried besides 0.
      fold: fold `1/s` into the norm in front where that is valid; elsewhere, and without, it is an `InputScaled`.
      rounded: round; `False` leaves the same function in floats, rescaled for a rounding that comes after it (`gptq`).
      targets: regex over paths; products that share an input share `s`, whether they are targets or not.

    Returns:
      `(model, params, axes)` with Quantized leaves, some in an InputScaled.
    """
    scheme = Scheme(bits, group, symmetric)

    def store(leaf: Any) -> Any:
        if isinstance(leaf, InputScaled | Masked):
            return leaf.replace(base=store(leaf.base))
        return Quantized.of(leaf, scheme)

    def rule(group: Group) -> dict[str, Any]:
        kernels = {name: matrix("awq", f"{group.layer}/{name}", leaf) for name, leaf in group.kernels.items()}
        chosen = [kernels[name] for name in kernels if name in group.chosen]
        known: Statistics = group.statistics
        scale, _ = awq_scale(chosen, known.mean, known.moment, scheme, steps)
        found = rescaled("awq", group, scale, fold)
        return {name: store(leaf) if rounded and name in group.chosen else leaf for name, leaf in found.items()}

    return model, calibrate(model, params, calibration, rule, who="awq", targets=targets, moment=True), axes
