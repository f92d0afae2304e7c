"""What a pure forward pass is told besides parameters and data."""

import zlib
from collections.abc import Callable

import jax
from flax import struct


def unsharded(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Leaves an activation where it is: the placement of a run without a mesh."""
    return x


class Context(struct.PyTreeNode):
    """Randomness and placement of one forward pass.

    Attributes:
      key: typed PRNG key for everything stochastic (dropout); `None` means a deterministic pass.
      place: `(activation, axis names) -> activation`, pins an activation to the mesh. Static.
      hidden: how far each dimension of the residual stream is open, float `[hidden]`, or `None` where all are: the site
        `hidden`, opened once a pass, which every norm, writer of the stream and head reads.
      observe: `(name, inputs)`, called by every `Observed` weight with what it is multiplied by, while a layer outside
        a scan is traced; what it is told are tracers, which whoever traces must return. Static.
    """

    key: jax.Array | None = None
    place: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = struct.field(pytree_node=False, default=unsharded)
    hidden: jax.Array | None = None
    observe: Callable[[str, jax.Array], None] | None = struct.field(pytree_node=False, default=None)

    def at(self, name: str | int | jax.Array) -> "Context":
        """The context of a named (or numbered) part, with a key of its own."""
        if self.key is None:
            return self
        data = zlib.crc32(name.encode()) if isinstance(name, str) else name
        return self.replace(key=jax.random.fold_in(self.key, data))

    def gated(self, x: jax.Array) -> jax.Array:
        """The residual stream `[..., hidden]` with its closed dimensions at zero."""
        return x if self.hidden is None else x * self.hidden.astype(x.dtype)
