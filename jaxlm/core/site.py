"""The Site socket: a named place in the forward pass that reads an optional pytree.

A site lives in the parameter tree beside the weights of its module; where the tree has none, the traced program is the
one without the place. A stack S is the root, `encoder` or `decoder`; L is one of its layers, `S/layers_3`; A is
`L/attention` or `L/cross_attention`.

| place | path | called with | gives |
|---|---|---|---|
| residual stream | `hidden` at the root | `.open(ctx)`, once a pass | how far each dimension is open |
| token embeddings | `S/after_embed` | `(x, ctx, tokens)` | `x`, to which positions and types are added, then the norm |
| before the keys | `A/kv_prefix` | `(ctx)` | a `Prefix` of keys and values |
| scores | `A/attention_scores` | `(queries, keys, ctx)` | what is added to them |
| outputs of the heads | `A/gate` | `(x, ctx)` | `x`, which is projected |
| after an attention | `L/after_attention`, `L/after_cross_attention` | `(y, ctx, x)` | `y`, before its dropout |
| units | `L/mlp/gate` | `(x, ctx)` | `x`, which is projected |
| after the MLP | `L/after_mlp` | `(y, ctx, x)` | `y`, before its dropout |
| update of a layer | `L/gate` | `(y, ctx)` | `y`, what the layer adds to the residual stream |

`x` and `y` are replaced by what is given, of the same shape. At `after_…`, `y` is the output of the sublayer and `x`
its input, normed where norms come first: an adapter in series reads `y`, a parallel one reads `x`. `tokens`, `queries`
and `keys` are `Tokens`. What is added to the scores is finite, float32, and broadcasts to `[rows, heads, queries,
keys]`; it follows from the tokens alone, so that a step of decoding adds what the full pass adds. `ctx.rows` holds what
the batch says of its rows, and `ctx.key` is that of the place (a gate takes its own from that of the module).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from jaxlm.core.context import Context
from jaxlm.core.weight import Axes, Component, Node


class Tokens(NamedTuple):
    """Segments and positions of the queries, or of the keys, of an attention.

    Attributes:
      segments: 0 is padding, and a token attends to its own segment only.
      order: index in the row: what the causal mask compares.
      positions: position in the document: what rotary embeddings read and sliding windows compare. Padding inside a
        prompt is not counted.
    """

    segments: Int[Array, "batch length"]
    order: Int[Array, "length"] | Int[Array, "batch length"]
    positions: Int[Array, "batch length"]


class Prefix(NamedTuple):
    """Keys and values before those of a row's tokens, which every query of the row attends to.

    They are neither rotated nor cached, no bias is added to their scores, and no mask or window hides them.
    """

    keys: Float[Array, "#rows length kv_heads head_dim"]
    values: Float[Array, "#rows length kv_heads head_dim"]


class Site(Node):
    """A pytree that is called at a place, with what the place says; see the table."""


class Switch(Site):
    """A site that multiplies: `x ⊙ open`. It switches heads, FFN units, whole layers or stream dimensions on and off.

    `open` is broadcast from the left over the last dimensions of what it gates: `[kv_heads, 1, 1]` (or
    `[kv_heads, q_per_kv, 1]`) on per-head contexts `[..., kv_heads, q_per_kv, head_dim]`, `[ffn]` on FFN activations,
    `[]` on a layer's update, `[hidden]` on the residual stream. It stands at every place that replaces what it is
    called with.
    """

    def open(self, ctx: Context) -> Float[Array, "*gates"]:
        """How far each entry is open in this pass, from 0 to 1."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*shape"], ctx: Context, *inputs: Any) -> Float[Array, "*shape"]:
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


def visit(
    params: Mapping[str, Any], name: str, x: Float[Array, "*shape"], ctx: Context, *inputs: Any
) -> Float[Array, "*shape"]:
    """`x` after the site `name` of a module's parameters, if there is one, called with a key of the place.

    A gate takes its own key, so that it is handed that of the module.
    """
    site = params.get(name)
    return x if site is None else site(x, ctx if name == "gate" else ctx.at(name), *inputs)
