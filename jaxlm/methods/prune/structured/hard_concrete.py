"""HardConcrete: a switch that is learned, and the constraint that holds several of them to a target."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxlm.core import Axes, Component, Context, Site, Switch

TEMPERATURE, STRETCH = 2 / 3, (-0.1, 1.1)
"""β, and (γ, ζ), of the hard concrete distribution."""


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


class Constraint(Site):
    """The target that learned gates are held to in this step, and the multiplier; no activation passes it."""

    target: Float[Array, ""]
    multiplier: Float[Array, ""]

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"target": Component(axes, "buffer"), "multiplier": Component(axes, "buffer")}
