"""Quantization whose ranges are learned: LSQ the weight's step, PACT the clipping of its inputs."""

import math
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxlm.core import Axes, Component, FakeQuant, Quantized, Weight, materialize
from jaxlm.core.weights.quantized import scale_axes
from jaxlm.core.weights.scheme import (
    INT8,
    INTEGERS,
    Scale,
    Scheme,
    ZeroPoint,
    from_codes,
    grid,
    reduce_groups,
    replace_gradient,
    spread,
    to_codes,
)


def scale_gradient(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """`x`, whose gradient is multiplied by `factor`.

    >>> jax.grad(scale_gradient)(3.0, 0.25).item()
    0.25
    """
    return replace_gradient(x, x * factor)


def learned_step(
    w: Float[Array, "*layers rows columns"], step: Scale, scheme: Scheme, axis: int = -2
) -> Float[Array, "*layers rows columns"]:
    """`ŵ = s · clip(round(w/s), ±Q)`, differentiated in both: LSQ.

    `∂ŵ/∂w` is 1 where `|w/s| ≤ Q`, else 0; `∂ŵ/∂s` is `round(w/s) - w/s` there, else `±Q`, and the gradient of the
    step is scaled by `1/sqrt(N Q)`, with N weights to a step, so that it moves about as fast as they do. Source: Esser
    et al. 2020, arXiv:1902.08153; the code `-2^{b-1}` stays unused, as everywhere here.

    >>> ds = lambda w: jax.grad(lambda s: learned_step(w, s, Scheme("int4")).sum())(jnp.full((1, 1), 0.5)).item()
    >>> [round(ds(jnp.array([[w]])) * 7**0.5, 3) for w in (0.6, 9.0)]  # round(1.2) - 1.2, and Q
    [-0.2, 7.0]
    """
    largest = scheme.largest
    shared = w.shape[-2] * w.shape[-1] / (step.shape[-2] * step.shape[-1])
    step = positive(scale_gradient(step, 1 / math.sqrt(shared * largest)))
    wide = spread(step, w.shape[axis], scheme, axis)
    steps = w.astype(jnp.float32) / wide
    inside = jnp.abs(steps) <= largest
    slope = jax.lax.stop_gradient(jnp.where(inside, jnp.round(steps) - steps, largest * jnp.sign(steps)))
    value = from_codes(to_codes(w, step, None, scheme, axis), step, None, scheme, axis)
    return replace_gradient(value.astype(w.dtype), jnp.where(inside, w, 0) + (slope * wide).astype(w.dtype))


def positive(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`|s|`, and 1 for 0: a learned scale may cross zero, and one of a padded channel is zero."""
    return jnp.where(scale == 0, 1.0, jnp.abs(scale))


def learned_clip(x: Float[Array, "*batch in"], clip: Float[Array, ""], scheme: Scheme) -> Float[Array, "*batch in"]:
    """Inputs clipped to `[0, α]` (asymmetric `scheme`) or `[-α, α]` and quantized: PACT.

    `q(clip(x, 0, α))` with `s = α / (2^b - 1)`; `∂/∂x` is 1 inside, `∂/∂α` is 1 where `x ≥ α`; the symmetric form adds
    -1 where `x ≤ -α`. Source: Choi et al. 2018, arXiv:1805.06085.

    >>> unsigned = Scheme("int8", "tensor", symmetric=False)
    >>> jax.grad(lambda a: learned_clip(jnp.array([0.3, 7.0, 9.0]), a, unsigned).sum())(6.0).item()
    2.0
    """
    bound = positive(clip)
    scale, zero = clip_grid(bound, scheme)
    codes = to_codes(x.reshape(-1, x.shape[-1]), scale, zero, scheme, -1)
    rounded = from_codes(codes, scale, zero, scheme, -1).astype(x.dtype).reshape(x.shape)
    low = -bound if scheme.symmetric else jnp.zeros_like(bound)
    return replace_gradient(rounded, jnp.where(x >= bound, bound, jnp.where(x <= low, low, x)).astype(x.dtype))


def clip_grid(clip: Float[Array, ""], scheme: Scheme) -> tuple[Scale, ZeroPoint | None]:
    """The grid `[1, 1]` of inputs clipped at a positive `clip`."""
    return grid(jnp.stack([jnp.zeros_like(clip), clip]).astype(jnp.float32)[None], scheme)


STATIC = Scheme("int8", "tensor")
"""Static int8 activations: all inputs on one grid."""


class LSQ(FakeQuant):
    """`W = s · clip(round(base/s), ±Q)` with a learned step `s` for every channel, group or tensor (`learned_step`).

    Attributes:
      scale: the steps, shaped as in `scheme`.
    """

    scale: Scale = struct.field(default=None)

    @classmethod
    def of(
        cls,
        base: Float[Array, "in out"] | Weight,
        scheme: Scheme = INT8,
        *,
        dynamic: bool = False,
        activations: Scheme | None = None,
        channel: int = -1,
    ) -> Self:
        """A weight in training, its steps at `2 mean|w| / sqrt(Q)`, as in the paper."""
        if scheme.bits not in INTEGERS or not scheme.symmetric:
            raise ValueError(f"LSQ learns the step of symmetric integers, not of {scheme}")
        weight = super().of(base, scheme, dynamic=dynamic, activations=activations, channel=channel)
        magnitude = jnp.abs(materialize(base).astype(jnp.float32))
        total, count = (reduce_groups(jnp.sum, a, scheme, weight.axis) for a in (magnitude, jnp.ones_like(magnitude)))
        step = 2 * total / count / math.sqrt(scheme.largest)
        return weight.replace(scale=jnp.where(step == 0, 1.0, step))

    def grid(self, dense: Float[Array, "*layers in out"]) -> tuple[Scale, None]:
        return positive(self.scale), None

    def materialize(self) -> Float[Array, "*layers in out"]:
        return learned_step(materialize(self.base), self.scale, self.scheme, self.axis)

    def components(self, axes: Axes) -> dict[str, Component]:
        shared = scale_axes(axes, self.scheme, self.axis)
        return super().components(axes) | {"scale": Component(shared, "scale")}


class PACT(FakeQuant):
    """A FakeQuant whose inputs are clipped at a learned bound and quantized, all on one grid (`learned_clip`).

    Attributes:
      activations: integers with the group `"tensor"`. Static.
      clip: the bound α.
    """

    activations: Scheme = struct.field(pytree_node=False, default=STATIC)
    clip: Float[Array, "*layers"] = struct.field(default=None)

    @classmethod
    def of(
        cls,
        base: Float[Array, "in out"] | Weight,
        scheme: Scheme = INT8,
        *,
        dynamic: bool = False,
        activations: Scheme | None = None,
        channel: int = -1,
        clip: float = 8.0,
    ) -> Self:
        """A weight in training, its inputs (int8 unless `activations` says otherwise) clipped at `clip` at first."""
        if dynamic:
            raise ValueError("PACT learns one range for all inputs; FakeQuant rounds them a token at a time")
        activations = STATIC if activations is None else activations
        if scheme.bits not in INTEGERS or activations.bits not in INTEGERS or activations.group != "tensor":
            raise ValueError(f"PACT rounds to integers, with one range for all inputs; not {scheme}, {activations}")
        if not clip > 0:
            raise ValueError(f"PACT: the bound of the inputs must be positive, not {clip}")
        return cls(base, scheme=scheme, activations=activations, channel=channel, clip=jnp.float32(clip))

    def rounded(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        return learned_clip(x, self.clip, self.activations)

    def quantize(self) -> Quantized:
        scale, zero = clip_grid(positive(self.clip), self.activations)
        stored = super().quantize()
        return stored.replace(input_scale=scale.reshape(()), input_zero=None if zero is None else zero.reshape(()))

    def components(self, axes: Axes) -> dict[str, Component]:
        return super().components(axes) | {"clip": Component((), "scale")}
