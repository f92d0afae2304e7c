"""FakeQuant: quantization-aware training with a straight-through estimator."""

from typing import Self

import jax
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxlm.core.context import Context
from jaxlm.core.matmul import matmul, matmul_transposed
from jaxlm.core.weight import Axes, Component, Weight, Wrapper, materialize
from jaxlm.core.weights.quantized import Quantized, check_activations, per_token
from jaxlm.core.weights.scheme import INT8, Scale, Scheme, ZeroPoint, grid, straight_through, to_codes


class FakeQuant(Wrapper):
    """`W = q(base)`: the float weight is trained, the forward pass sees its quantized values.

    The grid follows the weight: recomputed in every pass and not differentiated, exactly as `Quantized.of` computes it,
    so that `quantize()` stores the function that was trained.

    Attributes:
      base: the weight that is trained.
      scheme: format of the weight. Static.
      activations: format of the inputs, quantized a token at a time; `None` leaves them in floats. Static.
      channel: dimension with a scale of its own, as in `Quantized`. Static.
    """

    scheme: Scheme = struct.field(pytree_node=False, default=INT8)
    activations: Scheme | None = struct.field(pytree_node=False, default=None)
    channel: int = struct.field(pytree_node=False, default=-1)

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
        """A weight in training, with the arguments of `Quantized.of`.

        Raises:
          ValueError: for formats that do not go together, or inputs that are not quantized a token at a time.
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

    def grid(self, dense: Float[Array, "*layers in out"]) -> tuple[Scale, ZeroPoint | None]:
        """Scale and zero point of the weight."""
        return grid(dense, self.scheme, self.axis)

    def materialize(self) -> Float[Array, "*layers in out"]:
        dense = materialize(self.base)
        return straight_through(dense, *jax.lax.stop_gradient(self.grid(dense)), self.scheme, self.axis)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        return matmul(self.rounded(x) if self.channel == -1 else x, self.materialize(), dtype)

    def attend(
        self, x: Float[Array, "*batch out"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch in"]:
        return matmul_transposed(self.rounded(x) if self.channel == -2 else x, self.materialize(), dtype)

    def rounded(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """The inputs as an integer product would see them."""
        if self.activations is None:
            return x
        rows = x.reshape(-1, x.shape[-1])
        scale, zero = jax.lax.stop_gradient(grid(rows, self.activations, -1))
        return straight_through(rows, scale, zero, self.activations, -1).reshape(x.shape)

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
