"""Network: a config and the pure functions that follow from it."""

import dataclasses
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Axes, Context, Tree, abstract, axis_names, axis_sizes, flatten, initialize, unflatten
from jaxlm.models.config import ModelConfig
from jaxlm.models.heads import apply_head
from jaxlm.models.transformer import Stream, check_length, enter, forward, leave, model_spec, opened
from jaxlm.nn.block import block
from jaxlm.nn.layer import Layer
from jaxlm.nn.stack import run_view


@dataclass(frozen=True)
class Network:
    """What methods and the trainer know of a network: its structure, its names, its forward pass; no parameters."""

    config: ModelConfig

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, float32, canonical view."""
        return initialize(key, model_spec(self.config))

    def abstract(self) -> dict[str, Any]:
        """The parameters' shapes, without memory."""
        return abstract(model_spec(self.config))

    def axes(self) -> dict[str, Axes]:
        """Axis names by path."""
        return axis_names(model_spec(self.config))

    def sizes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Sizes of the factors of every dimension by path."""
        return axis_sizes(model_spec(self.config))

    def forward(self, params: Tree, batch: Mapping[str, jax.Array], **options: Any) -> dict[str, Any]:
        """See `transformer.forward`."""
        return forward(self.config, params, batch, **options)

    # The same forward pass in steps, for those who look at, or change, one layer after the other:
    #
    #     finished = None
    #     for side in model.sides():
    #         stream = model.embed(params, batch, side, finished)
    #         for path in model.layer_paths(side):
    #             stream = model.block(model.layer(path), subtree(params, path), stream)
    #         finished = model.finish(params, stream, side)
    #     outputs = model.head(params, finished)

    def sides(self) -> tuple[str, ...]:
        """Prefixes of the stacks in the order in which data pass them."""
        return ("encoder/", "decoder/") if self.config.encoder_decoder else ("",)

    def layer_paths(self, side: str = "") -> list[str]:
        """Paths of the layers of a stack in their order: `layers_0`, … or `decoder/layers_0`, …"""
        layers = self.config.num_decoder_layers if side == "decoder/" else self.config.num_layers
        return [f"{side}layers_{i}" for i in range(layers)]

    def embed(
        self,
        params: Tree,
        batch: Mapping[str, jax.Array],
        side: str = "",
        source: Stream | None = None,
        *,
        ctx: Context = Context(),
        dtype: Any = jnp.float32,
    ) -> Stream:
        """What the first layer of a stack receives; `source` is the finished encoder that a decoder reads."""
        check_length(self.config, batch["input_ids"].shape[1])
        return enter(self.config, params, batch, side, source=source, ctx=opened(params, ctx), dtype=dtype)

    def block(self, layer: Layer, params: Tree, stream: Stream, *, ctx: Context = Context()) -> Stream:
        """The stream after one layer of the structure `layer`; `params` is the layer's own subtree."""
        ctx = ctx.replace(hidden=stream.hidden)
        return stream._replace(x=block(params, stream.x, layer, stream.around, None, ctx).x)

    def valid(self, stream: Stream, product: str) -> jax.Array:
        """Which rows are real tokens in what a product of a layer (`attention/query`) reads: bool `[batch, length]`."""
        crosses = product.startswith(("cross_attention/key", "cross_attention/value"))
        tokens = stream.around.source_tokens if crosses else stream.around.queries
        assert tokens is not None, "only a decoder that reads an encoder has a cross-attention"
        return tokens.segments > 0

    def finish(self, params: Tree, stream: Stream, side: str = "") -> Stream:
        """What a stack gives out after its last layer."""
        return stream._replace(x=leave(self.config, params, stream.x, Context(hidden=stream.hidden), side))

    def head(self, params: Tree, stream: Stream, *, ctx: Context = Context()) -> dict[str, jax.Array]:
        """Outputs of the head on the finished stream: `logits` and what else `forward` gives."""
        ctx = ctx.replace(hidden=stream.hidden)
        return apply_head(self.config, params, stream.x, stream.around.queries.segments, ctx)

    def run_view(
        self, params: Tree, verdict: Callable[[str], Hashable] = lambda layer: None, breaks: Collection[int] = ()
    ) -> dict[str, Any]:
        """Stacks consecutive layers of equal structure and equal `verdict(path of the layer)`.

        Args:
          params: canonical view.
          verdict: what else must be equal (whether a layer trains, for instance).
          breaks: layers that begin a new segment, because the activation before them is tapped; no matter where
            layers share their parameters.
        """
        shares = self.config.layer_map or self.config.decoder_layer_map

        def kind(path: str) -> Hashable:
            number = int(path.rpartition("layers_")[2])
            return self.layer(path), verdict(path), 0 if shares else sum(b <= number for b in breaks)

        return run_view(params, kind)

    def layer(self, path: str) -> Layer:
        """Structure of the stored layer at `layers_3` or `decoder/layers_3`, where it is applied first."""
        decoder = path.startswith("decoder/")
        layers = self.config.decoder_layers() if decoder else self.config.layers()
        return layers[self.config.stored_layers(decoder)[int(path.rpartition("layers_")[2])]]

    def unshared(self, params: Tree) -> dict[str, Any]:
        """The tree (canonical view) of the same network without sharing: shared leaves are repeated, not copied."""
        maps = {"decoder/": self.config.decoder_layer_map}
        maps["encoder/" if self.config.encoder_decoder else ""] = self.config.layer_map
        flat: dict[str, Any] = {}
        for path, leaf in flatten(params).items():
            found = re.fullmatch(r"((?:encoder/|decoder/)?)layers_(\d+)/(.*)", path)
            shared = maps.get(found[1]) if found else None
            if found is None or shared is None:
                flat[path] = leaf
            else:
                flat |= {f"{found[1]}layers_{i}/{found[3]}": leaf for i, n in enumerate(shared) if n == int(found[2])}
        return unflatten(flat)

    def replace(self, config: ModelConfig) -> "Network":
        """The same with another structure."""
        return dataclasses.replace(self, config=config)
