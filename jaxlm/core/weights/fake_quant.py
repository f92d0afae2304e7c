"""FakeQuant: quantization-aware training with a straight-through estimator."""

from typing import Any, Self

import jax
from flax import struct

from jaxlm.core.context import Context
from jaxlm.core.matmul import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight, materialize
from jaxlm.core.weights.quantized import Quantized, check_activations, per_token
from jaxlm.core.weights.scheme import INT8, Scheme, grid, straight_through, to_codes


class FakeQuant(Weight):
    """`W = q(base)`: the float weight is trained, the forward pass sees what its codes stand for.

    The grid follows the weight: recomputed in every pass and not differentiated, exactly as `Quantized.of` computes it,
    so that `quantize()` stores the function that was trained.

    Attributes:
      base: array or Weight `[in, out]`.
      scheme: format of the weight. Static.
      activations: format of the inputs, rounded a token at a time; `None` leaves them as they are. Static.
      channel: dimension with a scale of its own, as in `Quantized`. Static.
    """

    base: jax.Array | Weight
    scheme: Scheme = struct.field(pytree_node=False, default=INT8)
    activations: Scheme | None = struct.field(pytree_node=False, default=None)
    channel: int = struct.field(pytree_node=False, default=-1)

    @classmethod
    def of(
        cls,
        base: jax.Array | Weight,
        scheme: Scheme = INT8,
        *,
        dynamic: bool = False,
        activations: Scheme | None = None,
        channel: int = -1,
    ) -> Self:
        """A weight in training, with the arguments of `Quantized.of`.

        Raises:
          ValueError: for formats that do not go together, or inputs that are not rounded a token at a time.
        """
        activations = per_token(scheme) if dynamic and activations is None else activations
        check_activations(scheme, activations)
        if activations is not None and activations.group is not None:
            raise ValueError("FakeQuant rounds inputs a token at a time; PACT learns one range for all of them")
        return cls(base, scheme=scheme, activations=activations, channel=channel)

    @property
    def axis(self) -> int:
        """The dimension along which groups run: that of the inputs."""
        return -3 - self.channel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def grid(self, dense: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point of the weight."""
        return grid(dense, self.scheme, self.axis)

    def materialize(self) -> jax.Array:
        dense = materialize(self.base)
        return straight_through(dense, *jax.lax.stop_gradient(self.grid(dense)), self.scheme, self.axis)

    def dot(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return matmul(self.rounded(x) if self.channel == -1 else x, self.materialize(), dtype)

    def attend(self, x: jax.Array, ctx: Context, dtype: Any = None) -> jax.Array:
        return matmul_transposed(self.rounded(x) if self.channel == -2 else x, self.materialize(), dtype)

    def rounded(self, x: jax.Array) -> jax.Array:
        """The inputs `[..., in]` as an integer product would see them."""
        if self.activations is None:
            return x
        rows = x.reshape(-1, x.shape[-1])
        own = jax.lax.stop_gradient(grid(rows, self.activations, -1))
        return straight_through(rows, *own, self.activations, -1).reshape(x.shape)

    def quantize(self) -> Quantized:
        """The stored form: the same function with codes."""
        dense = materialize(self.base)
        scale, zero = self.grid(dense)
        return Quantized(
            to_codes(dense, scale, zero, self.scheme, self.axis),
            scale,
            zero,
            scheme=self.scheme,
            activations=self.activations,
            channel=self.channel,
            dtype_name=self.dtype.name,
        )

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base")}
