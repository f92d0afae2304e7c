"""Scheme: a number format, its granularity, and the three functions that every quantizer is built from.

    scale, zero = grid(w, scheme)                  # the grid of values that codes can represent
    codes = to_codes(w, scale, zero, scheme)       # round to nearest
    w_hat = from_codes(codes, scale, zero, scheme) # dequantize, float32

`w` is `[..., in, out]`. Groups run along the inputs, `axis=-2`; a table `[rows, width]` whose rows are the outputs of a
tied head has its inputs at `axis=-1`. Shapes of `scale` (float32) and `zero` (int8; `None` for a symmetric scheme):

    group          axis=-2            axis=-1
    None           [..., 1, out]      [..., rows, 1]          one a channel
    g              [..., G, out]      [..., rows, G]          G = ceil(inputs / g); the last group may be shorter
    "tensor"       [..., 1, 1]        [..., 1, 1]

A part of the inputs can be encoded on the grid of the whole, which is what column-by-column methods need: the grid of
one group, `scale[..., i // g : i // g + 1, :]`, is broadcast over any rows of that group.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Num

from jaxlm.core.lookup import lookup

Scale = Float32[Array, "*layers scale_rows scale_columns"]
"""The scales of a matrix, shaped as above."""
ZeroPoint = Int8[Array, "*layers scale_rows scale_columns"]
"""Its zero points, one for every scale."""

INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
FLOATS = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The sixteen values of 4-bit NormalFloat: Dettmers et al. 2023, arXiv:2305.14314, appendix E."""
FORMATS = {**INTEGERS, **dict.fromkeys(FLOATS, 8), "nf4": 4}
"""Bits of every format by its name."""


@dataclass(frozen=True)
class Scheme:
    """A number format with its granularity; hashable, so that it can be a static field of a Weight.

    Attributes:
      bits: `int2` … `int8`, `fp8_e4m3`, `fp8_e5m2` or `nf4`.
      group: inputs that share a scale; `None` for all of a channel, `"tensor"` for one scale in all.
      symmetric: the range is `±max|w|` and the zero of the codes is 0; else it is `min … max`, stretched to include 0,
        with a zero point of its own (integers only).
    """

    bits: str = "int8"
    group: int | str | None = None
    symmetric: bool = True

    def __post_init__(self):
        lookup(FORMATS, str(self.bits), "number format")
        whole = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group > 0
        if not (self.group is None or self.group == "tensor" or whole):
            raise ValueError(f"group {self.group!r}: give a number of inputs, None (one scale a channel) or 'tensor'")
        if not self.symmetric and self.bits not in INTEGERS:
            raise ValueError(f"{self.bits} is symmetric by construction; only integers have a zero point")

    @property
    def width(self) -> int:
        """Bits of the format."""
        return FORMATS[self.bits]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the codes. Formats of four bits and fewer are `int4`, which XLA keeps two to a byte in memory."""
        if self.bits in FLOATS:
            return jnp.dtype(FLOATS[self.bits])
        return jnp.dtype(jnp.int4 if self.width <= 4 else jnp.int8)

    @property
    def largest(self) -> float:
        """The code that the largest entry gets: `2^{b-1} - 1`, the largest finite float, or 1."""
        if self.bits == "nf4":
            return 1.0
        return float(jnp.finfo(self.dtype).max) if self.bits in FLOATS else 2.0 ** (self.width - 1) - 1

    @property
    def smallest(self) -> float:
        """The smallest code: `-largest`, or `-2^{b-1}` where the scheme is asymmetric."""
        return -self.largest - (not self.symmetric)

    def groups(self, inputs: int) -> int:
        """Groups along that many inputs, the last one perhaps shorter.

        >>> Scheme("int4", 64).groups(100), Scheme("int4").groups(100)
        (2, 1)
        """
        return math.ceil(inputs / self.group) if isinstance(self.group, int) else 1


INT8 = Scheme()
"""Symmetric int8, one scale a channel."""


def grid(w: Float[Array, "*layers rows columns"], scheme: Scheme, axis: int = -2) -> tuple[Scale, ZeroPoint | None]:
    """Scale and zero point of every channel, group or tensor, from its smallest and largest entry.

    Symmetric `s = max|w| / largest`. Asymmetric, with the range stretched to include 0,
    `s = (max - min) / (2^b - 1)`, `z = round(-2^{b-1} - min/s)`. Where all entries are 0, `s = 1`.

    >>> scale, _ = grid(jnp.array([[-63.5], [0.0]]), Scheme("int8"))
    >>> scale.tolist()
    [[0.5]]
    >>> scale, zero = grid(jnp.array([[0.0], [5.1]]), Scheme("int8", symmetric=False))
    >>> round(scale.item(), 4), zero.item()
    (0.02, -128)
    """
    w = w.astype(jnp.float32)
    if scheme.symmetric:
        scale = reduce_groups(jnp.max, jnp.abs(w), scheme, axis) / scheme.largest
        return jnp.where(scale == 0, 1.0, scale), None
    low = jnp.minimum(reduce_groups(jnp.min, w, scheme, axis), 0)
    high = jnp.maximum(reduce_groups(jnp.max, w, scheme, axis), 0)
    scale = (high - low) / (scheme.largest - scheme.smallest)
    scale = jnp.where(scale == 0, 1.0, scale)
    zero = jnp.clip(jnp.round(scheme.smallest - low / scale), scheme.smallest, scheme.largest)
    return scale, zero.astype(jnp.int8)


def reduce_groups(reduce: Any, w: Float[Array, "*layers rows columns"], scheme: Scheme, axis: int) -> Scale:
    """A reduction (`jnp.max`, …) over the entries that share a scale: the dimension of inputs becomes one of groups."""
    if scheme.group == "tensor":
        return reduce(w, axis=(-2, -1), keepdims=True)
    if scheme.group is None:
        return reduce(w, axis=axis, keepdims=True)
    return reduce(grouped(w, scheme, axis), axis=axis)


def grouped(w: Num[Array, "*layers rows columns"], scheme: Scheme, axis: int = -2) -> Num[Array, "*layers _ _ _"]:
    """The inputs' dimension split into (groups, group) in its place; a shorter last group is filled with zeros, which
    change no range (0 lies in it) and no sum of products.

    >>> grouped(jnp.arange(3.0)[:, None], Scheme("int4", 2)).squeeze(-1).tolist()
    [[0.0, 1.0], [2.0, 0.0]]
    """
    inputs = w.shape[axis]
    groups = scheme.groups(inputs)
    size = math.ceil(inputs / groups) if groups == 1 else int(scheme.group or 0)
    axis %= w.ndim
    if missing := groups * size - inputs:
        w = jnp.pad(w, [(0, missing if d == axis else 0) for d in range(w.ndim)])
    return w.reshape(*w.shape[:axis], groups, size, *w.shape[axis + 1 :])


def spread(scale: Num[Array, "*layers _ _"], inputs: int, scheme: Scheme, axis: int = -2) -> Num[Array, "*layers _ _"]:
    """Scales or zero points of groups repeated for every input; those shared by all inputs keep a dimension of 1."""
    groups = scale.shape[axis]
    if groups == 1 or not isinstance(scheme.group, int):
        return scale
    if groups * scheme.group == inputs:
        return jnp.repeat(scale, scheme.group, axis=axis, total_repeat_length=inputs)
    return jnp.take(scale, np.minimum(np.arange(inputs) // scheme.group, groups - 1), axis=axis)


def to_codes(
    w: Float[Array, "*layers rows columns"], scale: Scale, zero: ZeroPoint | None, scheme: Scheme, axis: int = -2
) -> Num[Array, "*layers rows columns"]:
    """The nearest code of every entry, clipped to the format's range; half is rounded to even.

    Integers `clip(round(w/s) + z)`, floats `w/s` rounded by the cast, nf4 the index of the nearest value in the table
    (of two equally near the smaller) less 8. A scale of 0 (a padded channel) counts as 1.

    >>> to_codes(jnp.array([[0.7], [0.8], [99.0]]), jnp.array([[0.5]]), None, Scheme("int8")).ravel().tolist()
    [1, 2, 127]
    """
    scale = spread(jnp.where(scale == 0, 1.0, scale), w.shape[axis], scheme, axis)
    steps = w.astype(jnp.float32) / scale
    if scheme.bits == "nf4":
        # Fifteen comparisons: XLA runs them three times as fast as a binary search, which is a loop of gathers.
        above = [(steps > border).astype(jnp.int8) for border in (NF4[1:] + NF4[:-1]) / 2]
        return (sum(above[1:], above[0]) - 8).astype(scheme.dtype)
    if scheme.bits in FLOATS:
        return jnp.clip(steps, -scheme.largest, scheme.largest).astype(scheme.dtype)
    steps = jnp.round(steps)
    if zero is not None:
        steps = steps + spread(zero, w.shape[axis], scheme, axis).astype(jnp.float32)
    return jnp.clip(steps, scheme.smallest, scheme.largest).astype(scheme.dtype)


def from_codes(
    codes: Num[Array, "*layers rows columns"], scale: Scale, zero: ZeroPoint | None, scheme: Scheme, axis: int = -2
) -> Float32[Array, "*layers rows columns"]:
    """The values of codes: `(codes - z) · s`, of nf4 `table[codes + 8] · s`.

    >>> from_codes(jnp.array([[2], [-3]], jnp.int8), jnp.array([[0.5]]), None, Scheme("int8")).ravel().tolist()
    [1.0, -1.5]
    """
    return unscaled_values(codes, zero, scheme, axis) * spread(scale, codes.shape[axis], scheme, axis)


def unscaled_values(
    codes: Num[Array, "*layers rows columns"], zero: ZeroPoint | None, scheme: Scheme, axis: int = -2
) -> Float32[Array, "*layers rows columns"]:
    """The values of codes in units of their scale: `codes - z`, of nf4 the value in the table."""
    if scheme.bits == "nf4":
        return jnp.take(NF4, codes.astype(jnp.int32) + 8, axis=0)
    steps = codes.astype(jnp.float32)
    return steps if zero is None else steps - spread(zero, codes.shape[axis], scheme, axis).astype(jnp.float32)


def straight_through(
    x: Float[Array, "*layers rows columns"], scale: Scale, zero: ZeroPoint | None, scheme: Scheme, axis: int = -2
) -> Float[Array, "*layers rows columns"]:
    """`from_codes(to_codes(x))` in the dtype of `x`, with the gradient of the identity inside the range and 0 outside.

    The range is closed, and of an asymmetric grid half a step wider (its ends are not codes): the entries that set a
    scale lie on the border and learn like any other. Source: Bengio et al. 2013, arXiv:1308.3432.

    >>> straight_through(jnp.array([[0.7], [0.8], [99.0]]), jnp.array([[0.5]]), None, Scheme("int8")).ravel().tolist()
    [0.5, 1.0, 63.5]
    """
    scale = jnp.where(scale == 0, 1.0, scale)
    rounded = from_codes(to_codes(x, scale, zero, scheme, axis), scale, zero, scheme, axis).astype(x.dtype)
    steps = x.astype(jnp.float32) / spread(scale, x.shape[axis], scheme, axis)
    if zero is None:
        inside = jnp.abs(steps) <= scheme.largest * (1 + 1e-6)
    else:
        steps = steps + spread(zero, x.shape[axis], scheme, axis).astype(jnp.float32)
        inside = (steps >= scheme.smallest - 0.5) & (steps <= scheme.largest + 0.5)
    return replace_gradient(rounded, jnp.where(inside, x, 0))


def replace_gradient(value: Float[Array, "*shape"], gradient_of: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`value` to the bit, differentiated as `gradient_of`."""
    return jax.lax.stop_gradient(value) + (gradient_of - jax.lax.stop_gradient(gradient_of))
