"""Clustered: a weight whose entries are shared: a codebook of few values, and a code an entry."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt8

from jaxlm.core import Axes, Component, Context, Weight


class Clustered(Weight):
    """`W_ij = codebook[group_i, code_ij]`.

    The codebook trains: the gradient of a value is the sum of the gradients of the entries that share it.

    Attributes:
      codes: position of every entry in its codebook.
      groups: the codebook of every input. One number an input, so that inputs can be sliced.
      codebook: the values of every group.
    """

    codes: UInt8[Array, "*layers in out"]
    groups: Int32[Array, "*layers in"]
    codebook: Float[Array, "*layers groups values"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        return self.codebook.dtype

    def materialize(self) -> Float[Array, "*layers in out"]:
        def entries(
            codes: UInt8[Array, "in out"], groups: Int32[Array, "in"], codebook: Float[Array, "groups values"]
        ) -> Float[Array, "in out"]:
            return codebook[groups[:, None], codes]

        for _ in self.codes.shape[:-2]:  # layers of a stack have codebooks of their own
            entries = jax.vmap(entries)
        return entries(self.codes, self.groups, self.codebook)

    def take(self, ids: Int[Array, "*batch"], ctx: Context) -> Float[Array, "*batch out"]:
        return self.codebook[self.groups[ids][..., None], self.codes[ids]]

    def components(self, axes: Axes) -> dict[str, Component]:
        return {
            "codes": Component(axes, "codes"),
            "groups": Component((axes[0],), "buffer"),
            "codebook": Component((None, None), "base"),
        }
