"""The Site socket: a named place in the forward pass that reads an optional pytree.

A site lives in the parameter tree beside the weights of its module and is called with one activation of that module;
where the tree has none, the activation passes unchanged.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Node


class Site(Node):
    """A pytree called as `site(x, ctx)`."""

    def __call__(self, x: Float[Array, "*shape"], ctx: Context) -> Float[Array, "*shape"]:
        raise NotImplementedError


class Switch(Site):
    """A site that multiplies: `x ⊙ open`. It switches heads, FFN units, whole layers or stream dimensions on and off.

    `open` is broadcast from the left over the last dimensions of what it gates: `[kv_heads, 1, 1]` (or
    `[kv_heads, q_per_kv, 1]`) on per-head contexts `[..., kv_heads, q_per_kv, head_dim]`, `[ffn]` on FFN activations,
    `[]` on a layer's update, `[hidden]` on the residual stream.
    """

    def open(self, ctx: Context) -> Float[Array, "*gates"]:
        """How far each entry is open in this pass, from 0 to 1."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*shape"], ctx: Context) -> Float[Array, "*shape"]:
        return x * self.open(ctx).astype(x.dtype)


class Gate(Switch):
    """A switch with a fixed position.

    Attributes:
      value: how far each entry is open, see `Switch`.
    """

    value: Float[Array, "*gates"]

    def open(self, ctx: Context) -> Float[Array, "*gates"]:
        return self.value

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"value": Component(axes, "mask")}


class HardConcrete(Switch):
    """A switch that is learned: `z = clip(s (ζ - γ) + γ, 0, 1)`, `s = σ((log u - log(1 - u) + log α) / β)`, u uniform.

    A pass with a key draws `u`, so that z is 0 and 1 with positive probability each and differentiable between; a
    deterministic pass takes `s = σ(log α)`. The constants are β = 2/3, γ = -0.1, ζ = 1.1.
    Source: Louizos et al. 2018, arXiv:1712.01312.

    Attributes:
      score: `log α / speed`, see `Switch` for its shape. Adam moves every parameter by the learning rate a step,
        whatever its gradient; so gates learn `speed` times as fast as weights. The gradient is that of `log α`: where
        the norm of all gradients is clipped, one times `speed` would leave the weights little.
      speed: static.
    """

    score: Float[Array, "*gates"]
    speed: float = struct.field(pytree_node=False, default=1.0)

    @property
    def log_alpha(self) -> Float[Array, "*gates"]:
        constant = jax.lax.stop_gradient(self.score)
        return constant * self.speed + (self.score - constant)

    def open(self, ctx: Context) -> Float[Array, "*gates"]:
        key = ctx.at("gate").key
        if key is None:
            s = jax.nn.sigmoid(self.log_alpha)
        else:
            u = jax.random.uniform(key, self.score.shape, jnp.float32, 1e-6, 1 - 1e-6)
            s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + self.log_alpha) / TEMPERATURE)
        return jnp.clip(s * (STRETCH[1] - STRETCH[0]) + STRETCH[0], 0.0, 1.0)

    def probability(self) -> Float[Array, "*gates"]:
        """`P(z > 0) = σ(log α - β log(-γ / ζ))`.

        >>> [round(float(p), 3) for p in HardConcrete(jnp.array([-4.0, 0.0, 4.0])).probability()]
        [0.083, 0.832, 0.996]
        """
        return jax.nn.sigmoid(self.log_alpha - TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1]))

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"score": Component(axes, "scale")}


TEMPERATURE, STRETCH = 2 / 3, (-0.1, 1.1)
"""β, and (γ, ζ), of the hard concrete distribution."""


class Constraint(Site):
    """The target that learned gates are held to in this step, and the multiplier; no activation passes it."""

    target: Float[Array, ""]
    multiplier: Float[Array, ""]

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"target": Component(axes, "buffer"), "multiplier": Component(axes, "buffer")}


SITES: dict[str, type[Site]] = {"Constraint": Constraint, "Gate": Gate, "HardConcrete": HardConcrete}


def visit(params: Mapping[str, Any], name: str, x: Float[Array, "*shape"], ctx: Context) -> Float[Array, "*shape"]:
    """`x` after the site `name` of a module's parameters, if there is one."""
    site = params.get(name)
    return x if site is None else site(x, ctx)
