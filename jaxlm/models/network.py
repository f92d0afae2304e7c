"""Network: a config and the pure functions that follow from it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import (
    Axes,
    Context,
    Tap,
    Tree,
    abstract,
    axis_names,
    axis_sizes,
    flatten,
    initialize,
    text_rows,
    unflatten,
)
from jaxlm.models.config import ModelConfig
from jaxlm.models.heads import apply_head
from jaxlm.models.transformer import (
    Stream,
    check_length,
    embed_inputs,
    finalize,
    forward,
    model_spec,
    with_stream_gate,
)
from jaxlm.nn.block import block
from jaxlm.nn.layer import Layer
from jaxlm.nn.stack import run_view


@functools.lru_cache(maxsize=32)
def _spec(config: ModelConfig) -> dict[str, Any]:
    return model_spec(config)


@dataclass(frozen=True)
class Network:
    """The structure of a network, with its parameter names and its forward pass, but without parameters."""

    config: ModelConfig

    @property
    def spec(self) -> dict[str, Any]:
        """Every parameter of the network: shape, axis names, initial distribution; built once, not to be changed."""
        return _spec(self.config)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, float32, canonical view."""
        return initialize(key, self.spec)

    def abstract(self) -> dict[str, Any]:
        """The parameters' shapes, without memory."""
        return abstract(self.spec)

    def axes(self) -> dict[str, Axes]:
        """Axis names by path."""
        return axis_names(self.spec)

    def sizes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Sizes of the factors of every dimension by path."""
        return axis_sizes(self.spec)

    def forward(self, params: Tree, batch: Mapping[str, jax.Array], **options: Any) -> dict[str, Any]:
        """See `transformer.forward`."""
        return forward(self.config, params, batch, **options)

    # The same forward pass in steps, for methods that inspect or change one layer after the other:
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
        """The input of the first layer of a stack; `source` is the finished encoder that a decoder reads."""
        batch = text_rows(batch)
        check_length(self.config, batch["input_ids"].shape[1])
        ctx = with_stream_gate(params, ctx).with_rows(batch)
        return embed_inputs(self.config, params, batch, side, source=source, ctx=ctx, dtype=dtype)

    def block(self, layer: Layer, params: Tree, stream: Stream, *, ctx: Context = Context()) -> Stream:
        """The stream after one layer of the structure `layer`; `params` is the subtree of that layer."""
        return stream._replace(x=block(params, stream.x, layer, stream.inputs, None, stream.context(ctx)).x)

    def valid(self, stream: Stream, product: str) -> jax.Array:
        """Which inputs of a product of a layer (`attention/query`) are real tokens: bool `[batch, length]`."""
        crosses = product.startswith(("cross_attention/key", "cross_attention/value"))
        tokens = stream.inputs.source_tokens if crosses else stream.inputs.queries
        assert tokens is not None, "only a decoder that reads an encoder has a cross-attention"
        return tokens.segments > 0

    def finish(self, params: Tree, stream: Stream, side: str = "") -> Stream:
        """The output of a stack after its last layer."""
        return stream._replace(x=finalize(self.config, params, stream.x, stream.context(Context()), side))

    def head(self, params: Tree, stream: Stream, *, ctx: Context = Context()) -> dict[str, jax.Array]:
        """Outputs of the head on the finished stream, `logits` among them; see `apply_head`."""
        return apply_head(self.config, params, stream.x, stream.inputs.queries.segments, stream.context(ctx))

    def run_view(
        self, params: Tree, verdict: Callable[[str], Hashable] = lambda layer: None, breaks: Collection[int] = ()
    ) -> dict[str, Any]:
        """Stacks consecutive layers of equal structure and equal `verdict(path of the layer)`.

        Args:
          params: canonical view.
          verdict: what else must be equal (whether a layer trains, for instance).
          breaks: layers that begin a new segment, because the activation before them is tapped; ignored if layers
            share their parameters.
        """
        shares = self.config.layer_map or self.config.decoder_layer_map

        def kind(path: str) -> Hashable:
            number = int(path.rpartition("layers_")[2])
            return self.layer(path), verdict(path), 0 if shares else sum(b <= number for b in breaks)

        return run_view(params, kind)

    def tap_breaks(self, taps: Collection[Tap]) -> set[int]:
        """Layers that begin a new segment (see `run_view`), so that only tapped activations leave the scan.

        A tapped hidden state is between two layers; any other tap needs a segment of its layer alone. If most layers
        are tapped, one scan that returns all their activations is a smaller program than many short scans.
        """
        breaks = {tap.depth for tap in taps} | {tap.depth + 1 for tap in taps if tap.site != "hidden"}
        return breaks if 2 * len(breaks) <= self.config.num_layers else set()

    def layer(self, path: str) -> Layer:
        """Structure of the stored layer at `layers_3` or `decoder/layers_3`, that of the first layer that uses it."""
        decoder = path.startswith("decoder/")
        layers = self.config.decoder_layers() if decoder else self.config.layers()
        return layers[self.config.stored_layers(decoder)[int(path.rpartition("layers_")[2])]]

    def unshared(self, params: Tree) -> dict[str, Any]:
        """The tree (canonical view) of the same network without sharing: shared leaves are repeated, not copied."""
        maps = {"decoder/": self.config.decoder_layer_map}
        maps["encoder/" if self.config.encoder_decoder else ""] = self.config.layer_map
        flat: dict[str, Any] = {}
        for path, leaf in flatten(params).items():
            match = re.fullmatch(r"((?:encoder/|decoder/)?)layers_(\d+)/(.*)", path)
            layer_map = maps.get(match[1]) if match else None
            if match is None or layer_map is None:
                flat[path] = leaf
            else:
                side, stored, rest = match.groups()
                flat |= {f"{side}layers_{i}/{rest}": leaf for i, n in enumerate(layer_map) if n == int(stored)}
        return unflatten(flat)

    def replace(self, config: ModelConfig) -> "Network":
        """The same with another structure."""
        return dataclasses.replace(self, config=config)
