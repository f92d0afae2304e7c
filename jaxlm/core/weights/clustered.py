"""Clustered: a weight whose entries are shared, few values and for each entry which."""

import jax

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Weight


class Clustered(Weight):
    """`W_ij = codebook[group_i, code_ij]`.

    The codebook trains: the gradient of a value is the sum of the gradients of the entries that share it.

    Attributes:
      codes: uint8 `[in, out]`.
      groups: int32 `[in]`, the codebook of every input. One number for each, so that inputs can be sliced.
      codebook: `[groups, values]`.
    """

    codes: jax.Array
    groups: jax.Array
    codebook: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self):
        return self.codebook.dtype

    def materialize(self) -> jax.Array:
        def entries(codes: jax.Array, groups: jax.Array, codebook: jax.Array) -> jax.Array:
            return codebook[groups[:, None], codes]

        for _ in self.codes.shape[:-2]:  # layers of a stack have codebooks of their own
            entries = jax.vmap(entries)
        return entries(self.codes, self.groups, self.codebook)

    def take(self, ids: jax.Array, ctx: Context) -> jax.Array:
        return self.codebook[self.groups[ids][..., None], self.codes[ids]]

    def components(self, axes: Axes) -> dict[str, Component]:
        return {
            "codes": Component(axes, "codes"),
            "groups": Component((axes[0],), "buffer"),
            "codebook": Component((None, None), "base"),
        }
