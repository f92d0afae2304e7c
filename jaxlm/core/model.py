"""What a method may know of a model, without importing one: the structure of a network, and the carrier of a model.

Both are Protocols. `jaxlm.models.network.Network` and `jaxlm.io.lm.LM` are what runs.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, Protocol, Self

import jax

from jaxlm.core.context import Context
from jaxlm.core.loss import Batch, Tap
from jaxlm.core.paths import Tree
from jaxlm.core.weight import Axes


class Network(Protocol):
    """A structure and the pure functions that follow from it; hashable, and without parameters."""

    @property
    def config(self) -> Any:
        """Sizes, places of norms, sharing, head: a ModelConfig."""

    def abstract(self) -> dict[str, Any]:
        """The parameters' shapes, canonical view."""

    def sizes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Sizes of the factors of every dimension by path: what slicing along a compound axis needs."""

    def forward(
        self,
        params: Tree,
        batch: Batch,
        *,
        ctx: Context = ...,
        taps: Collection[Tap] = ...,
        remat: str = ...,
        dtype: Any = ...,
    ) -> dict[str, Any]:
        """`logits`, `last_hidden`, `taps` of a batch, in either view of the parameters."""

    def run_view(
        self, params: Tree, verdict: Callable[[str], Hashable] = ..., breaks: Collection[int] = ...
    ) -> dict[str, Any]:
        """The parameters with consecutive layers of equal structure stacked."""

    def tap_breaks(self, taps: Collection[Tap]) -> set[int]:
        """Layers that begin a segment of their own, so that only tapped activations leave the scan."""

    def unshared(self, params: Tree) -> dict[str, Any]:
        """The tree of the same network without sharing between layers."""

    def sides(self) -> tuple[str, ...]:
        """Prefixes of the stacks, in the order in which data pass them."""

    def layer_paths(self, side: str = "") -> list[str]:
        """Paths of the layers of a stack in their order."""

    def layer(self, path: str) -> Any:
        """Structure of a stored layer."""

    def embed(self, params: Tree, batch: Batch, side: str = "", source: Any = None) -> Any:
        """The stream that the first layer of a stack receives."""

    def block(self, layer: Any, params: Tree, stream: Any, *, ctx: Context = ...) -> Any:
        """The stream after one layer, of which `params` is the subtree."""

    def valid(self, stream: Any, product: str) -> jax.Array:
        """Which tokens of what a product of a layer reads are real: bool `[batch, length]`."""

    def finish(self, params: Tree, stream: Any, side: str = "") -> Any:
        """What a stack gives out after its last layer."""

    def replace(self, config: Any) -> "Network":
        """The same functions for another structure."""


class LM(Protocol):
    """A language model: what loading gives, surgery takes and gives, training begins from and ends in, saving writes.

    It never changes; `replace` gives another. Parameters are in the canonical view: arrays, Weights, or shapes of them.
    """

    @property
    def config(self) -> Any:
        """The structure: a ModelConfig."""

    @property
    def network(self) -> Network:
        """The functions that follow from the structure."""

    @property
    def params(self) -> Tree:
        """Parameters, canonical view."""

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Axis names of every parameter by path, of leaves that methods added too."""

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, or `None`."""

    @property
    def carried(self) -> Mapping[str, Any]:
        """What goes on from a model directory to the next besides the network: special tokens, generation settings."""

    def replace(self, **changes: Any) -> Self:
        """The same with another `config`, `params` or `axes`."""

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """The same with another tokenizer, and the ids in `carried` as they are in its vocabulary."""
