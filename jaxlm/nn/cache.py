"""The Cache socket: what keeps the keys and values of an attention between the steps of decoding.

| call | gives |
|---|---|
| `write(keys, values, start)` | the cache that holds them too, row i's from place `start[i]` |
| `read()` | `keys, values, valid`, in the order of the places |
| `tokens(row)` | which tokens of the row the places hold: a ring of places reuses them |

Attention calls these three and looks at nothing else, so that places may be codes with scales, pages or a ring. A cache
is a pytree; in a stack that scans, every array has a leading `layers` axis.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxlm.core import Tokens


class Cached(NamedTuple):
    """What a cache holds.

    Attributes:
      keys, values: `[rows, places, kv_heads, head_dim]`; keys are rotated.
      valid: bool `[rows, places]`, which places have been written.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array


class Cache(struct.PyTreeNode):
    """The keys and values of one attention."""

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> Self:
        """The cache after `keys` and `values` `[rows, length, kv_heads, head_dim]` are written.

        Row i's go to the places `start[i], …, start[i] + length - 1` (start: int `[rows]`), and what was behind them
        is not valid any more: a row whose start is 0 begins anew.
        """
        raise NotImplementedError

    def read(self) -> Cached:
        """All places, written or not."""
        raise NotImplementedError

    def tokens(self, row: Tokens) -> Tokens:
        """Of all tokens of every row, `[rows, tokens]`, those that the places hold, `[rows, places]`."""
        return row


class DenseCache(Cache):
    """A place for every token of a row.

    Attributes:
      keys, values: `[rows, places, kv_heads, head_dim]`.
      length: int32 `[rows]`, how many places of each row have been written, from the first on.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, rows: int, places: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32) -> Self:
        """A cache in which nothing is written.

        >>> one = jnp.ones((2, 1, 1, 1))
        >>> cache = DenseCache.empty(2, 3, 1, 1).write(one, one, jnp.array([0, 1]))
        >>> cache.keys[:, :, 0, 0].tolist(), cache.read().valid.tolist()
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[True, False, False], [True, True, False]])
        """
        shape = (rows, places, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> Self:
        return self.replace(
            keys=write_rows(self.keys, keys, start),
            values=write_rows(self.values, values, start),
            length=start + jnp.int32(keys.shape[1]),
        )

    def read(self) -> Cached:
        return Cached(self.keys, self.values, jnp.arange(self.keys.shape[1]) < self.length[:, None])


def write_rows(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`old [rows, places, …]` with `new [rows, length, …]` in the places from `start [rows]` on, in the dtype of `old`.

    >>> write_rows(jnp.zeros((2, 3), int), jnp.array([[7], [8]]), jnp.array([0, 2])).tolist()
    [[7, 0, 0], [0, 0, 8]]

    Raises:
      ValueError: if `new` is longer than `old`.
    """
    if new.shape[1] > old.shape[1]:
        raise ValueError(
            f"{new.shape[1]} tokens a row do not fit a cache of {old.shape[1]} places; make it longer (`empty_cache`)"
        )
    return jax.vmap(lambda o, n, s: jax.lax.dynamic_update_slice_in_dim(o, n, s, axis=0))(
        old, new.astype(old.dtype), start
    )
