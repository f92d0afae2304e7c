"""What a forward pass reads besides parameters and data."""

import zlib
from collections.abc import Callable, Mapping

import jax
from flax import struct
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxlm.core.batch import ROWS, row_columns


def unsharded(x: Shaped[Array, "*shape"], names: tuple[str | None, ...]) -> Shaped[Array, "*shape"]:
    """Leaves an activation where it is: the placement of a run without a mesh."""
    return x


class Context(struct.PyTreeNode):
    """Randomness, placement and the rows of one forward pass.

    Attributes:
      key: typed PRNG key for everything stochastic (dropout); `None` means a deterministic pass.
      place: `(activation, axis names) -> activation`, pins an activation to the mesh. Static.
      hidden: how far each dimension of the residual stream is open, or `None` where all are: the site `hidden`, opened
        once a pass, which every norm, writer of the stream and head reads.
      observe: `(name, inputs)`, called by every `Observed` weight with what it is multiplied by, while a layer outside
        a scan is traced; its inputs are tracers, which whoever traces must return. Static.
      rows: what a Weight or a Site may know of the rows of the batch, by name: arrays `[rows, ...]`, the column
        `rows/adapter` as `adapter`. Every pass over the rows has the same ones, each step of decoding too; of a column
        about the tokens of a row, `[rows, length, ...]`, an entry is found by the token's index in the row
        (`Tokens.order`), and a token beyond its length has none.
    """

    key: Key[Array, ""] | None = None
    place: Callable[[Array, tuple[str | None, ...]], Array] = struct.field(pytree_node=False, default=unsharded)
    hidden: Float[Array, "hidden"] | None = None
    observe: Callable[[str, Array], None] | None = struct.field(pytree_node=False, default=None)
    rows: Mapping[str, Shaped[Array, "rows ..."]] = struct.field(default_factory=dict)

    def at(self, name: str | int | Int[Array, ""]) -> "Context":
        """The context of a named (or numbered) part, with a key of its own."""
        if self.key is None:
            return self
        data = zlib.crc32(name.encode()) if isinstance(name, str) else name
        return self.replace(key=jax.random.fold_in(self.key, data))

    def with_rows(self, batch: Mapping[str, Array]) -> "Context":
        """The context of a pass over the rows of a batch."""
        return self.replace(rows={name.removeprefix(ROWS): array for name, array in row_columns(batch).items()})

    def gated(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """The residual stream with its closed dimensions at zero."""
        return x if self.hidden is None else x * self.hidden.astype(x.dtype)
