"""GPTQ: rounding in which the weights not yet rounded make up for those that are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Axes, Masked, Quantized, Tree
from jaxlm.core.weights.quantized import check_activations, per_token
from jaxlm.core.weights.scheme import Scheme, from_codes, grid, spread, to_codes
from jaxlm.methods.calibration import KERNELS, Calibration, Statistics, calibrate, each, matrix
from jaxlm.methods.second_order import BLOCK, inverse_factor, sweep


class Rounded(NamedTuple):
    """A matrix as codes with their grid, as `grid` and `to_codes` shape them, and what they stand for, `[in, out]`."""

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    values: jax.Array


Grid = tuple[jax.Array, jax.Array | None]


def nearest(row: jax.Array, own: Grid, scheme: Scheme) -> jax.Array:
    """A row `[out]` rounded to its grid, whose arrays are `[out]` (or `[1]`, one for the tensor)."""
    scale, zero = own[0][None], None if own[1] is None else own[1][None]
    return from_codes(to_codes(row[None], scale, zero, scheme), scale, zero, scheme)[0]


@functools.cache
def _steps(scheme: Scheme, late: bool) -> tuple[Callable, Callable]:
    """`begin` and `settle` of the sweep. With `late` grids each group's grid comes from the weights as they are when
    the sweep arrives there, otherwise each row is told its own."""
    single = dataclasses.replace(scheme, group=None)

    def begin(rows: jax.Array, diagonal: jax.Array) -> Grid | None:
        scale, zero = grid(rows, single)
        return (scale[0], None if zero is None else zero[0]) if late else None

    def settle(plan: Grid | None, number: jax.Array, row: jax.Array, told: dict) -> tuple[jax.Array, Grid | None]:
        own = plan if plan is not None else told["grid"]
        return jnp.where(told["mask"], nearest(row, own, single), 0), plan

    return begin, settle


def gptq_matrix(
    w: jax.Array,
    moment: Any,
    scheme: Scheme,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    mask: jax.Array | None = None,
    path: str = "the matrix",
    block: int = BLOCK,
) -> Rounded:
    """The rounding of `W [in, out]` with the smallest `‖X(W − Ŵ)‖` that one sweep over the inputs finds.

    With groups, scales come from the weights that the sweep has already moved, so that they fit what they round. With
    `act_order` inputs are settled in the order of falling `H_ii`, the loud ones first while all the others can still
    make up for them; groups then have the grid of the weights as they were (their inputs are settled at different
    times), and codes and grid lie in the order of the inputs again.

    Args:
      w: float32 `[in, out]`; rows whose input is always 0 become 0.
      moment: `H = XᵀX [in, in]`.
      mask: bool `[in, out]`, false where the weight stays 0.
      path: of the parameter, for messages.
    """
    h = np.asarray(moment, np.float64)
    w = jnp.where((np.diagonal(h) > 0)[:, None], w, 0)
    order = np.argsort(-np.diagonal(h), kind="stable") if act_order else np.arange(len(h))
    late = isinstance(scheme.group, int) and not act_order
    told: dict[str, Any] = {"mask": jnp.ones(w.shape, bool) if mask is None else mask}
    scale, zero = grid(w, scheme)
    if not late:
        across = lambda a: jnp.broadcast_to(spread(a, len(w), scheme), (len(w), a.shape[-1]))  # noqa: E731
        told["grid"] = (across(scale), None if zero is None else across(zero))
    group = min(scheme.group, len(w)) if late and isinstance(scheme.group, int) else block
    begin, settle = _steps(scheme, late)
    values, grids = sweep(
        w[order],
        inverse_factor(h[order][:, order], damping, "gptq", path),
        jax.tree.map(lambda a: a[order], told),
        begin=begin,
        settle=settle,
        group=group,
        block=max(block // group, 1) * group,
    )
    if late:
        scale, zero = grids[0][::group], None if grids[1] is None else grids[1][::group]
    values = values[np.argsort(order)]
    return Rounded(to_codes(values, scale, zero, scheme), scale, zero, values)


def gptq(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    calibration: Calibration,
    *,
    bits: str = "int4",
    group: int | str | None = 128,
    symmetric: bool = True,
    dynamic: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    targets: str = KERNELS,
):
    """Surgery: rounds every target so that its outputs change least, layer by layer behind what is rounded already.

    Zeros of a mask stay zeros. Source: Frantar et al. 2022, arXiv:2210.17323.

    Args:
      model, params, axes: the model, canonical view.
      calibration: text, from `config.calibration`.
      bits, group, symmetric: the number format, see `Scheme`.
      dynamic: products round their inputs too, a token at a time.
      act_order: inputs in the order of falling `H_ii`; often better where a few are far louder than the rest.
      damping: λ as a share of the mean of H's diagonal.
      targets: regex over paths.

    Returns:
      `(model, params, axes)` with Quantized leaves (below their masks, where there are any).
    """
    scheme = Scheme(bits, group, symmetric)
    activations = per_token(scheme) if dynamic else None
    check_activations(scheme, activations)

    def change(path: str, leaf: Any, statistics: Statistics) -> Any:
        mask = leaf.mask if isinstance(leaf, Masked) else None
        w = matrix("gptq", path, leaf)
        rounded = gptq_matrix(w, statistics.moment, scheme, act_order=act_order, damping=damping, mask=mask, path=path)
        stored = Quantized(
            rounded.codes,
            rounded.scale,
            rounded.zero,
            scheme=scheme,
            activations=activations,
            dtype_name=leaf.dtype.name,
        )
        return stored if mask is None else Masked(stored, mask)

    return model, calibrate(model, params, calibration, each(change), who="gptq", targets=targets, moment=True), axes
