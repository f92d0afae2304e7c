"""Scored: a masked weight with the scores that decide which entries stay."""

from flax import struct
from jaxtyping import Array, Float32

from jaxlm.core import Axes, Component, Masked


class Scored(Masked):
    """A Masked weight whose entries carry scores, gathered while it trains.

    Attributes:
      scores: defined by the method that gathers them; sharded as the weight is.
    """

    scores: Float32[Array, "*layers in out"] = struct.field(kw_only=True)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {**super().components(axes), "scores": Component(axes, "mask")}
