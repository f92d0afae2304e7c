"""Quantized: a weight stored as codes of a number format, and its products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8, Num

from jaxlm.core.context import Context
from jaxlm.core.matmul import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight
from jaxlm.core.weights.integer import scaled_product
from jaxlm.core.weights.scheme import (
    FLOATS,
    INT8,
    INTEGERS,
    Scale,
    Scheme,
    ZeroPoint,
    from_codes,
    grid,
    straight_through,
    to_codes,
    unscaled_values,
)


class Quantized(Weight):
    """`W = (codes - zero) · scale`, or a table's values times `scale`.

    `channel` is the dimension that has scales: -1 (outputs, for kernels) or -2 (rows, for embedding tables, whose rows
    are the outputs of a tied head); groups run along the other one.

    Without `activations` the codes are widened and multiplied in floats. With them the inputs are quantized too:
    dynamically, a token at a time by its largest entry (`Scheme("int8")`), or statically, all by one grid that was
    calibrated (`Scheme("int8", "tensor")`, then `input_scale` and `input_zero` hold it). The product then runs in
    integers: see `integer.scaled_product`. Its derivative is that of the product in floats, with the gradient passed
    straight through the quantization of the inputs, so that the layers below can be trained.

    Attributes:
      codes: in `scheme.dtype`; int4 takes half a byte an entry, in memory and on disk.
      scale: shaped as in `scheme`.
      zero: shaped like `scale`; `None` in a symmetric scheme.
      input_scale: of static activations; input_zero: of static asymmetric ones.
      scheme: format of the weight. Static.
      activations: format of the inputs, `None` leaves them in floats. Static.
      channel: dimension with a scale of its own, -1 or -2. Static.
      dtype_name: dtype of the materialized matrix. Static.
    """

    codes: Num[Array, "*layers in out"]
    scale: Scale
    zero: ZeroPoint | None = None
    input_scale: Float32[Array, "*layers"] | None = None
    input_zero: Int8[Array, "*layers"] | None = None
    scheme: Scheme = struct.field(pytree_node=False, default=INT8)
    activations: Scheme | None = struct.field(pytree_node=False, default=None)
    channel: int = struct.field(pytree_node=False, default=-1)
    dtype_name: str = struct.field(pytree_node=False, default="float32")

    @classmethod
    def of(
        cls,
        w: Float[Array, "*layers in out"],
        scheme: Scheme = INT8,
        *,
        dynamic: bool = False,
        activations: Scheme | None = None,
        channel: int = -1,
        input_range: tuple[float, float] | None = None,
    ) -> "Quantized":
        """Round to nearest: codes and scales of a dense matrix.

        Args:
          dynamic: short for the `activations` that go with the scheme, one scale a token.
          input_range: smallest and largest input, for static activations (those with the group `"tensor"`).

        Raises:
          ValueError: for formats that do not go together, or one of `input_range` and static activations alone.
        """
        activations = per_token(scheme) if dynamic and activations is None else activations
        check_activations(scheme, activations)
        if (input_range is not None) != (activations is not None and activations.group == "tensor"):
            raise ValueError("an input_range and static activations (group 'tensor') go together; give both or neither")
        scale, zero = grid(w, scheme, -3 - channel)
        codes = to_codes(w, scale, zero, scheme, -3 - channel)
        weight = cls(
            codes, scale, zero, scheme=scheme, activations=activations, channel=channel, dtype_name=w.dtype.name
        )
        if input_range is None or activations is None:
            return weight
        input_scale, input_zero = grid(jnp.asarray(input_range, jnp.float32)[None], activations)
        layers = w.shape[:-2]
        fill = lambda a: None if a is None else jnp.broadcast_to(a.reshape(()), layers)  # noqa: E731
        return weight.replace(input_scale=fill(input_scale), input_zero=fill(input_zero))

    @property
    def axis(self) -> int:
        """The dimension along which groups run: that of the inputs."""
        return -3 - self.channel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype_name)

    def materialize(self) -> Float[Array, "*layers in out"]:
        return from_codes(self.codes, self.scale, self.zero, self.scheme, self.axis).astype(self.dtype)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        return product(x, self, dtype) if self.channel == -1 else matmul(x, self.materialize(), dtype)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        return product(x, self, dtype) if self.channel == -2 else matmul_transposed(x, self.materialize(), dtype)

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        scheme, rows = self.scheme, ids.reshape(-1)
        scale_rows = rows
        if self.channel == -1 and isinstance(scheme.group, int):
            scale_rows = rows // scheme.group
            scheme = Scheme(scheme.bits, None, scheme.symmetric)  # every row is taken with the scales of its group
        part = lambda a: a if a.shape[-2] == 1 else jnp.take(a, scale_rows, axis=-2)  # noqa: E731
        codes = jnp.take(self.codes, rows, axis=-2)
        zero = None if self.zero is None else part(self.zero)
        values = from_codes(codes, part(self.scale), zero, scheme, self.axis)
        return values.astype(self.dtype).reshape(*ids.shape, -1)

    def components(self, axes: Axes) -> dict[str, Component]:
        shared = scale_axes(axes, self.scheme, self.axis)
        parts = {"codes": Component(axes, "codes"), "scale": Component(shared, "buffer")}
        if self.zero is not None:
            parts["zero"] = Component(shared, "buffer")
        for field in ("input_scale", "input_zero"):
            if getattr(self, field) is not None:
                parts[field] = Component((), "buffer")
        return parts


def scale_axes(axes: Axes, scheme: Scheme, axis: int) -> Axes:
    """Axis names of scales: groups have the axis name of the inputs, so that slicing the inputs slices them too."""
    if scheme.group == "tensor":
        return (None, None)
    along = axes[axis] if isinstance(scheme.group, int) else None
    return (along, axes[1]) if axis == -2 else (axes[0], along)


def per_token(scheme: Scheme) -> Scheme:
    """The inputs' format that goes with a weight's: float8 with its own kind, int8 with integers; one scale a token."""
    return Scheme("fp8_e4m3" if scheme.bits in FLOATS else "int8")


def check_activations(scheme: Scheme, activations: Scheme | None) -> None:
    """Raises ValueError for inputs that cannot be multiplied with such codes."""
    if activations is None:
        return
    if scheme.bits == "nf4":
        raise ValueError("nf4 codes are places in a table and cannot be multiplied: leave the inputs in floats")
    if (scheme.bits in INTEGERS) != (activations.bits in INTEGERS):
        raise ValueError(
            f"inputs in {activations.bits} do not go with a weight in {scheme.bits}: integers with integers"
        )
    if isinstance(activations.group, int):
        raise ValueError("inputs have one scale a token (group None) or one in all (group 'tensor'), not one a group")


def quantize_inputs(
    x: Float[Array, "rows in"], w: Quantized
) -> tuple[Num[Array, "rows in"], Float32[Array, "#rows 1"], Int8[Array, "#rows 1"] | None]:
    """Codes of inputs, with their scale and zero point: one a row, or one in all where they are static."""
    assert w.activations is not None
    scale, zero = input_grid(x, w)
    codes = to_codes(x, scale, zero, w.activations, -1)
    return codes if w.scheme.bits in FLOATS else codes.astype(jnp.int8), scale, zero


def input_grid(
    x: Float[Array, "rows in"], w: Quantized
) -> tuple[Float32[Array, "#rows 1"], Int8[Array, "#rows 1"] | None]:
    """The grid of inputs: one a row, computed from it, or the static one."""
    assert w.activations is not None
    if w.input_scale is None:
        return grid(x, w.activations, -1)
    return w.input_scale.reshape(1, 1), None if w.input_zero is None else w.input_zero.reshape(1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*batch in"], w: Quantized, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
    """`x` times `w` over the dimension `w.axis`, that of the inputs, in `dtype`, by default that of `x`.

    Differentiated as `straight_through(x) @ W` in floats. The backward pass widens the codes again: between the passes
    nothing is kept but `x` and the codes.
    """
    rows = x.reshape(-1, x.shape[-1])
    if w.activations is not None:
        codes, scale, zero = quantize_inputs(rows, w)
        y = scaled_product(codes, zero, w.codes, w.scale, w.zero, w.scheme, w.axis) * scale
    elif w.scale.shape[w.axis] > 1:
        y = _matmul(rows, w.materialize(), w.axis, dtype)
    else:
        steps = unscaled_values(w.codes, w.zero, w.scheme, w.axis).astype(x.dtype)  # exact in bfloat16, but for nf4
        contract = (((1,), (w.axis % 2,)), ((), ()))
        y = jax.lax.dot_general(rows, steps, contract, preferred_element_type=jnp.float32)
        y = y * (w.scale if w.axis == -2 else w.scale.T)
    return y.astype(x.dtype if dtype is None else dtype).reshape(*x.shape[:-1], -1)


def _backward(
    dtype: DTypeLike | None, residuals: tuple[Float[Array, "*batch in"], Quantized], g: Float[Array, "*batch out"]
) -> tuple[Float[Array, "*batch in"], Quantized]:
    x, w = residuals
    rows, g = x.reshape(-1, x.shape[-1]), g.astype(x.dtype).reshape(-1, g.shape[-1])

    def rounded(rows: Float[Array, "rows in"]) -> Float[Array, "rows in"]:
        if w.activations is None:
            return rows
        return straight_through(rows, *jax.lax.stop_gradient(input_grid(rows, w)), w.activations, -1)

    inputs, inputs_vjp = jax.vjp(rounded, rows)
    dense, scale_vjp = jax.vjp(lambda scale: w.replace(scale=scale).materialize(), w.scale)
    (dx,) = inputs_vjp(_matmul(g, dense, -3 - w.axis).astype(x.dtype))
    pair = (inputs, g) if w.axis == -2 else (g, inputs)
    dw = jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    no_gradient = jax.tree.map(lambda _: None, w)
    return dx.reshape(x.shape), no_gradient.replace(scale=scale_vjp(dw.astype(dense.dtype))[0])


def _matmul(
    x: Float[Array, "rows in"], w: Float[Array, "_ _"], axis: int, dtype: DTypeLike | None = None
) -> Float[Array, "rows out"]:
    """`x` times `w` over the dimension `axis` of `w`."""
    return matmul(x, w, dtype) if axis == -2 else matmul_transposed(x, w, dtype)


product.defvjp(lambda x, w, dtype: (product(x, w, dtype), (x, w)), _backward)
