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
    """

    key: jax.Array | None = None
    place: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = struct.field(pytree_node=False, default=unsharded)

    def at(self, name: str | int | jax.Array) -> "Context":
        """The context of a named (or numbered) part, with a key of its own."""
        if self.key is None:
            return self
        data = zlib.crc32(name.encode()) if isinstance(name, str) else name
        return self.replace(key=jax.random.fold_in(self.key, data))


def dropout(x: jax.Array, rate: float, ctx: Context) -> jax.Array:
    """Inverted dropout: each entry is zeroed with probability `rate`, the others are divided by `1 - rate`.

    The decision is taken on 16 random bits, so the realised rate is `rate` rounded to 1/65536 (eight bits would turn
    0.1 into 0.1016). Identity when the context has no key.
    """
    if ctx.key is None or rate == 0.0:
        return x
    threshold = round(rate * 65536)
    keep = jax.random.bits(ctx.key, x.shape, "uint16") >= threshold
    return jax.numpy.where(keep, x * (65536 / (65536 - threshold)), 0).astype(x.dtype)
