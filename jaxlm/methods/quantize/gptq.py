"""GPTQ: quantization in which the weights not yet quantized make up for the errors of those that are."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8, Num

from jaxlm.core import LM, NO_DATA, Masked, Quantized, SurgeryContext
from jaxlm.core.weights.quantized import check_activations, per_token
from jaxlm.core.weights.scheme import Scale, Scheme, ZeroPoint, from_codes, grid, spread, to_codes
from jaxlm.methods.calibration import KERNELS, Statistics, calibrate, matrix, per_leaf
from jaxlm.methods.second_order import BLOCK, BeginGroup, Hessian, Matrix, SolveRow, inverse_factor, solve_rows


class QuantizedMatrix(NamedTuple):
    """A matrix as codes with their grid, as `grid` and `to_codes` shape them, and what they stand for."""

    codes: Num[Array, "in out"]
    scale: Scale
    zero: ZeroPoint | None
    values: Float32[Array, "in out"]


RowGrid = tuple[Float32[Array, "channels"], Int8[Array, "channels"] | None]
"""Scale and zero point of every entry of a row (or one of each for the tensor)."""


def round_row(row: Float[Array, "out"], row_grid: RowGrid, scheme: Scheme) -> Float32[Array, "out"]:
    """A row rounded to nearest on its grid."""
    scale, zero = row_grid[0][None], None if row_grid[1] is None else row_grid[1][None]
    return from_codes(to_codes(row[None], scale, zero, scheme), scale, zero, scheme)[0]


@functools.cache
def _group_and_row(scheme: Scheme, static_groups: bool) -> tuple[BeginGroup, SolveRow]:
    """`begin_group` and `quantize_row` of the solve, the same objects for the same scheme, so that it compiles once.

    With static groups each row brings the grid that it has from the start. Otherwise a group's grid comes from its
    rows as they are when the solve arrives there.
    """
    by_column = dataclasses.replace(scheme, group=None)

    def begin_group(rows: Float[Array, "group out"], U_diagonal: Float[Array, "group"]) -> RowGrid | None:
        if static_groups:
            return None
        scale, zero = grid(rows, by_column)
        return scale[0], None if zero is None else zero[0]

    def quantize_row(
        group_grid: RowGrid | None, index: jax.Array, row: Float[Array, "out"], row_data: dict[str, Any]
    ) -> tuple[Float[Array, "out"], RowGrid | None]:
        row_grid = row_data["grid"] if group_grid is None else group_grid
        return jnp.where(row_data["mask"], round_row(row, row_grid, by_column), 0), group_grid

    return begin_group, quantize_row


def gptq_matrix(
    W: Matrix,
    H: Hessian,
    scheme: Scheme,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    mask: Bool[Array | np.ndarray, "in out"] | None = None,
    path: str = "the matrix",
    block: int = BLOCK,
) -> QuantizedMatrix:
    """The quantization of W with the smallest `‖X(W − Ŵ)‖` that one pass over the inputs finds.

    With groups, scales come from the weights as earlier rows have moved them, so that they fit what is quantized. With
    `act_order` inputs are quantized in the order of falling `H_ii`, activation outliers first, while all the others can
    still make up for them; groups then have the grid of the weights as they were (static groups: their inputs are
    quantized at different times), and codes and grid lie in the order of the inputs again.

    Args:
      W: float32; rows whose input is always 0 become 0.
      H: `XᵀX`.
      mask: false where the weight stays 0.
      path: of the parameter, for messages.
    """
    H = np.asarray(H, np.float64)
    W = jnp.where((np.diagonal(H) > 0)[:, None], W, 0)
    inputs = len(W)
    order = np.argsort(-np.diagonal(H), kind="stable") if act_order else np.arange(inputs)

    # The grid of every row, where it does not depend on the solve.
    static_groups = act_order or not isinstance(scheme.group, int)
    scale, zero = grid(W, scheme)
    row_data: dict[str, Any] = {"mask": jnp.ones(W.shape, bool) if mask is None else mask}
    if static_groups:
        by_row = lambda a: jnp.broadcast_to(spread(a, inputs, scheme), (inputs, a.shape[-1]))  # noqa: E731
        row_data["grid"] = (by_row(scale), None if zero is None else by_row(zero))
    group = min(scheme.group, inputs) if isinstance(scheme.group, int) and not static_groups else block

    begin_group, quantize_row = _group_and_row(scheme, static_groups)
    values, grids = solve_rows(
        W[order],
        inverse_factor(H[order][:, order], damping, "gptq", path),
        jax.tree.map(lambda a: a[order], row_data),
        begin_group=begin_group,
        solve_row=quantize_row,
        group=group,
        block=max(block // group, 1) * group,
    )
    if not static_groups:  # every row gave the grid of its group
        scale, zero = grids[0][::group], None if grids[1] is None else grids[1][::group]
    values = values[np.argsort(order)]
    return QuantizedMatrix(to_codes(values, scale, zero, scheme), scale, zero, values)


def gptq(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    bits: str = "int4",
    group: int | str | None = 128,
    symmetric: bool = True,
    dynamic: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    targets: str = KERNELS,
) -> LM:
    """Surgery: quantizes every target so that its outputs change least, layer by layer behind those quantized already.

    Zeros of a mask stay zeros. Source: Frantar et al. 2022, arXiv:2210.17323.

    When: four bits and fewer, with calibration data: it gains more over round to nearest the fewer the bits.

    Args:
      bits, group, symmetric: the number format, see `Scheme`.
      dynamic: products quantize their activations too, a token at a time.
      act_order: inputs in the order of falling `H_ii`; often better where there are activation outliers.
      damping: λ as a share of the mean of H's diagonal.
      targets: regex over paths.

    Returns:
      the model with Quantized leaves (below their masks, where there are any).
    """
    scheme = Scheme(bits, group, symmetric)
    activations = per_token(scheme) if dynamic else None
    check_activations(scheme, activations)

    def change(path: str, leaf: Any, statistics: Statistics) -> Any:
        mask = leaf.mask if isinstance(leaf, Masked) else None
        W, H = matrix("gptq", path, leaf), statistics.hessian
        assert H is not None
        quantized = gptq_matrix(W, H, scheme, act_order=act_order, damping=damping, mask=mask, path=path)
        stored = Quantized(
            quantized.codes,
            quantized.scale,
            quantized.zero,
            scheme=scheme,
            activations=activations,
            dtype_name=leaf.dtype.name,
        )
        return stored if mask is None else Masked(stored, mask)

    return calibrate(lm, context, per_leaf(change), who="gptq", targets=targets, hessian=True)
