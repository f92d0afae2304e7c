"""The Site socket: a named place in the forward pass that reads an optional pytree.

A site lives in the parameter tree beside the weights of its module and is called with the activation that passes there;
where the tree has none, the activation passes unchanged.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Node


class Site(Node):
    """A pytree called as `site(x, ctx)`."""

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        raise NotImplementedError


class Gate(Site):
    """`x ⊙ value`: switches heads, FFN units or whole layers on and off.

    Attributes:
      value: broadcast from the left over the last dimensions of what it gates: `[kv_heads, 1, 1]` on
        per-head contexts `[..., kv_heads, q_per_kv, head_dim]`, `[ffn]` on FFN activations, `[]` on a layer's update.
    """

    value: jax.Array

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return x * self.value.astype(x.dtype)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"value": Component(axes, "mask")}


SITES: dict[str, type[Site]] = {"Gate": Gate}


def visit(params: Mapping[str, Any], name: str, x: jax.Array, ctx: Context) -> jax.Array:
    """`x` after the site `name` of a module's parameters, if there is one."""
    site = params.get(name)
    return x if site is None else site(x, ctx)
