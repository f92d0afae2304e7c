"""The Site socket: a named place in the forward pass that reads an optional pytree.

A site lives in the parameter tree beside the weights of its module and is called with one activation of that module;
where the tree has none, the activation passes unchanged.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Node


class Site(Node):
    """A pytree called as `site(x, ctx)`."""

    def __call__(self, x: Float[Array, "*shape"], ctx: Context) -> Float[Array, "*shape"]:
        raise NotImplementedError


class Switch(Site):
    """A site that multiplies: `x ⊙ open`. It switches heads, FFN units, whole layers or stream dimensions on and off.

    `open` is broadcast from the left over the last dimensions of what it gates: `[kv_heads, 1, 1]` (or
    `[kv_heads, q_per_kv, 1]`) on per-head contexts `[..., kv_heads, q_per_kv, head_dim]`, `[ffn]` on FFN activations,
    `[]` on a layer's update, `[hidden]` on the residual stream.
    """

    def open(self, ctx: Context) -> Float[Array, "*gates"]:
        """How far each entry is open in this pass, from 0 to 1."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*shape"], ctx: Context) -> Float[Array, "*shape"]:
        return x * self.open(ctx).astype(x.dtype)


class Gate(Switch):
    """A switch with a fixed position.

    Attributes:
      value: how far each entry is open, see `Switch`.
    """

    value: Float[Array, "*gates"]

    def open(self, ctx: Context) -> Float[Array, "*gates"]:
        return self.value

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"value": Component(axes, "mask")}


def visit(params: Mapping[str, Any], name: str, x: Float[Array, "*shape"], ctx: Context) -> Float[Array, "*shape"]:
    """`x` after the site `name` of a module's parameters, if there is one."""
    site = params.get(name)
    return x if site is None else site(x, ctx)
