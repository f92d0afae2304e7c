"""Quantized: a weight stored as codes of a number format, and its products."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.context import Context
from jaxlm.core.matmul import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight
from jaxlm.core.weights.integer import scaled_product
from jaxlm.core.weights.scheme import (
    FLOATS,
    INT8,
    INTEGERS,
    Scheme,
    from_codes,
    grid,
    steps_of,
    straight_through,
    to_codes,
)


class Quantized(Weight):
    """`W = (codes - zero) · scale`, or a table's values times `scale`.

    `channel` says which dimension owns the scales: -1 (outputs, for kernels) or -2 (rows, for embedding tables, whose
    rows are the outputs of a tied head); groups run along the other one.

    Without `activations` the codes are widened and multiplied in floats. With them the inputs are rounded too, a token
    at a time by its own largest entry (`Scheme("int8")`), or all by one grid that was measured before
    (`Scheme("int8", "tensor")`, then `input_scale` and `input_zero` hold it), and the product runs in integers: see
    `integer.scaled_product`. The derivative is that of the product in floats, with the gradient of the rounding passed
    straight through, so that what lies below can be trained.

    Attributes:
      codes: `[in, out]` in `scheme.dtype`; int4 takes half a byte an entry, in memory and on disk.
      scale: float32, shaped as in `scheme`.
      zero: int8 like `scale`, `None` in a symmetric scheme.
      input_scale: float32 `[]`, where inputs have one grid; input_zero: int8 `[]`, where that is asymmetric.
      scheme: format of the weight. Static.
      activations: format of the inputs, `None` to leave them as they are. Static.
      channel: dimension with a scale of its own, -1 or -2. Static.
      dtype_name: dtype of the materialized matrix. Static.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    input_scale: jax.Array | None = None
    input_zero: jax.Array | None = None
    scheme: Scheme = struct.field(pytree_node=False, default=INT8)
    activations: Scheme | None = struct.field(pytree_node=False, default=None)
    channel: int = struct.field(pytree_node=False, default=-1)
    dtype_name: str = struct.field(pytree_node=False, default="float32")

    @classmethod
    def of(
        cls,
        w: jax.Array,
        scheme: Scheme = INT8,
        *,
        dynamic: bool = False,
        activations: Scheme | None = None,
        channel: int = -1,
        input_range: tuple[float, float] | None = None,
    ) -> "Quantized":
        """Round to nearest: codes and scales of a dense matrix `[..., in, out]`.

        Args:
          dynamic: short for the `activations` that go with the scheme, one scale a token.
          input_range: smallest and largest input, for static activations (those with the group `"tensor"`).

        Raises:
          ValueError: for formats that do not go together, or a range too many or missing.
        """
        activations = per_token(scheme) if dynamic and activations is None else activations
        check_activations(scheme, activations)
        if (input_range is not None) != (activations is not None and activations.group == "tensor"):
            raise ValueError("an input_range and static activations (group 'tensor') go together; give both or neither")
        scale, zero = grid(w, scheme, -3 - channel)
        codes = to_codes(w, scale, zero, scheme, -3 - channel)
        own = cls(codes, scale, zero, scheme=scheme, activations=activations, channel=channel, dtype_name=w.dtype.name)
        if input_range is None or activations is None:
            return own
        input_scale, input_zero = grid(jnp.asarray(input_range, jnp.float32)[None], activations)
        lead = w.shape[:-2]
        fill = lambda a: None if a is None else jnp.broadcast_to(a.reshape(()), lead)  # noqa: E731
        return own.replace(input_scale=fill(input_scale), input_zero=fill(input_zero))

    @property
    def dynamic(self) -> bool:
        """Whether inputs are rounded a token at a time."""
        return self.activations is not None and self.activations.group is None

    @property
    def axis(self) -> int:
        """The dimension along which groups run: that of the inputs."""
        return -3 - self.channel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self):
        return jnp.dtype(self.dtype_name)

    def materialize(self) -> jax.Array:
        return from_codes(self.codes, self.scale, self.zero, self.scheme, self.axis).astype(self.dtype)

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return product(x, self, dtype) if self.channel == -1 else matmul(x, self.materialize(), dtype)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return product(x, self, dtype) if self.channel == -2 else matmul_transposed(x, self.materialize(), dtype)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        part = lambda a, i: a if a.shape[-2] == 1 else jnp.take(a, i, axis=-2)  # noqa: E731
        own = ids
        if self.channel == -1 and isinstance(self.scheme.group, int):
            own = ids // self.scheme.group
        flat = own.reshape(-1)
        zero = None if self.zero is None else part(self.zero, flat)
        codes = jnp.take(self.codes, ids.reshape(-1), axis=-2)
        scheme = self.scheme
        if self.channel == -1 and isinstance(scheme.group, int):
            scheme = Scheme(scheme.bits, None, scheme.symmetric)  # each row has found its group
        rows = from_codes(codes, part(self.scale, flat), zero, scheme, self.axis)
        return rows.astype(self.dtype).reshape(*ids.shape, -1)

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
    """Axis names of scales: groups lie along the inputs' own axis, which then cannot be cut without them."""
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


def round_inputs(x: jax.Array, w: Quantized) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes of inputs `[rows, in]`, with their scale and zero point: `[rows, 1]`, or `[1, 1]` if static."""
    assert w.activations is not None
    scale, zero = input_grid(x, w)
    codes = to_codes(x, scale, zero, w.activations, -1)
    return codes if w.scheme.bits in FLOATS else codes.astype(jnp.int8), scale, zero


def input_grid(x: jax.Array, w: Quantized) -> tuple[jax.Array, jax.Array | None]:
    """The grid of inputs `[rows, in]`: each row's own, or the one that was measured."""
    assert w.activations is not None
    if w.input_scale is None:
        return grid(x, w.activations, -1)
    return w.input_scale.reshape(1, 1), None if w.input_zero is None else w.input_zero.reshape(1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: Quantized, dtype: Any = None) -> jax.Array:
    """`x [..., in]` times `w` over the dimension that its scales are made for; `[..., out]` in `dtype` or that of `x`.

    Differentiated as `straight_through(x) @ W` in floats. The backward pass widens the codes again: between the passes
    nothing is kept but `x` and the codes.
    """
    rows = x.reshape(-1, x.shape[-1])
    if w.activations is not None:
        codes, scale, zero = round_inputs(rows, w)
        y = scaled_product(codes, zero, w.codes, w.scale, w.zero, w.scheme, w.axis) * scale
    elif w.scale.shape[w.axis] > 1:
        y = _matmul(rows, w.materialize(), w.axis, dtype)
    else:
        steps = steps_of(w.codes, w.zero, w.scheme, w.axis).astype(x.dtype)  # exact in bfloat16, but for nf4
        contract = (((1,), (w.axis % 2,)), ((), ()))
        y = jax.lax.dot_general(rows, steps, contract, preferred_element_type=jnp.float32)
        y = y * (w.scale if w.axis == -2 else w.scale.T)
    return y.astype(x.dtype if dtype is None else dtype).reshape(*x.shape[:-1], -1)


def _backward(dtype: Any, kept: tuple[jax.Array, Quantized], g: jax.Array) -> tuple[jax.Array, Quantized]:
    x, w = kept
    rows, g = x.reshape(-1, x.shape[-1]), g.astype(x.dtype).reshape(-1, g.shape[-1])

    def rounded(rows: jax.Array) -> jax.Array:
        if w.activations is None:
            return rows
        return straight_through(rows, *jax.lax.stop_gradient(input_grid(rows, w)), w.activations, -1)

    inputs, of_inputs = jax.vjp(rounded, rows)
    dense, of_scale = jax.vjp(lambda scale: w.replace(scale=scale).materialize(), w.scale)
    (dx,) = of_inputs(_matmul(g, dense, -3 - w.axis).astype(x.dtype))
    pair = (inputs, g) if w.axis == -2 else (g, inputs)
    dw = jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    nothing = jax.tree.map(lambda _: None, w)
    return dx.reshape(x.shape), nothing.replace(scale=of_scale(dw.astype(dense.dtype))[0])


def _matmul(x: jax.Array, w: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
    """`x` times `w` over the dimension `axis` of `w`."""
    return matmul(x, w, dtype) if axis == -2 else matmul_transposed(x, w, dtype)


product.defvjp(lambda x, w, dtype: (product(x, w, dtype), (x, w)), _backward)
