"""The driver of every method that must see inputs: it walks a model layer by layer and changes it on the way.

Within a layer the products come in the order in which data pass them, those that read the same input together: query,
key and value; output; gate and up; down. Before each group the layer runs again as far as there, so that a rule sees
inputs that have passed everything compressed before it, in this layer and in those below.

A *rule* receives a `Group` and returns the leaves of the layer that it replaces. The model is anything that offers
`sides`, `layer_paths`, `layer`, `embed`, `block`, `valid` and `finish` (see `jaxlm.models.network.Network`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import (
    Context,
    InputScaled,
    Masked,
    Observed,
    Tree,
    Weight,
    check_rules,
    describe,
    flatten,
    matches,
    materialize,
    unflatten,
)

KERNELS = r".*layers_\d+/.*/kernel"
"""What calibrated methods change by default: every product inside the layers."""

PRODUCTS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("attention/query", "attention/key", "attention/value"), "attention_norm"),
    (("attention/output",), None),
    (("cross_attention/query",), "cross_attention_norm"),
    (("cross_attention/key", "cross_attention/value"), None),
    (("cross_attention/output",), None),
    (("mlp/gate_proj", "mlp/up"), "mlp_norm"),
    (("mlp/down",), None),
)
"""The products of a layer that share an input, in the order in which data pass them, and the norm that makes it."""


@dataclass(frozen=True)
class Calibration:
    """Text that a model reads while it is compressed; never the text that it is evaluated on.

    Attributes:
      batches: numpy batches as the task makes them.
      source: the place that they were read from.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    source: str = ""

    def facts(self) -> dict[str, Any]:
        """What a report says of it: the source, its rows and their tokens."""
        masks = [batch[name] for batch in self.batches for name in ("attention_mask", "segment_ids") if name in batch]
        rows = sum(int(np.count_nonzero(mask.any(axis=1))) for mask in masks)
        return {"source": self.source, "samples": rows, "tokens": sum(int(np.count_nonzero(mask)) for mask in masks)}


class Statistics(NamedTuple):
    """What is known of the inputs `X [tokens, in]` of a product, padding left out; float32.

    Attributes:
      tokens: how many.
      square, absolute: `Σ x²` and `Σ|x|` of every input, `[in]`; low, high: its smallest and largest value.
      moment: `XᵀX [in, in]`, where it was asked for.
    """

    tokens: jax.Array
    square: jax.Array
    absolute: jax.Array
    low: jax.Array
    high: jax.Array
    moment: jax.Array | None = None

    @classmethod
    def of(cls, x: jax.Array, valid: jax.Array, moment: bool = False) -> "Statistics":
        """Those of `x [..., in]` where `valid [...]`.

        >>> x = jnp.array([[3.0, -1.0], [0.0, 1.0], [9.0, 9.0]])
        >>> found = Statistics.of(x, jnp.array([True, True, False]), moment=True)
        >>> found.norm.tolist(), found.mean.tolist(), found.moment.tolist()
        ([3.0, 1.4142135381698608], [1.5, 1.0], [[9.0, -3.0], [-3.0, 2.0]])
        """
        counted = valid.reshape(-1, 1)
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        rows = jnp.where(counted, x, 0)
        low, high = (jnp.where(counted, x, jnp.inf).min(axis=0), jnp.where(counted, x, -jnp.inf).max(axis=0))
        # The highest precision: elsewhere than on a CPU, float32 products are rounded to fewer bits by default.
        product = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST) if moment else None
        square = jnp.sum(jnp.square(rows), axis=0) if product is None else jnp.diagonal(product)
        return cls(jnp.sum(valid), square, jnp.sum(jnp.abs(rows), axis=0), low, high, product)

    def add(self, other: "Statistics") -> "Statistics":
        """Those of both sets of tokens."""
        moment = None if self.moment is None or other.moment is None else self.moment + other.moment
        return Statistics(
            self.tokens + other.tokens,
            self.square + other.square,
            self.absolute + other.absolute,
            jnp.minimum(self.low, other.low),
            jnp.maximum(self.high, other.high),
            moment,
        )

    def scaled(self, scale: jax.Array) -> "Statistics":
        """Those of the inputs times `scale [in]`."""
        moment = None if self.moment is None else self.moment * scale[:, None] * scale
        ends = self.low * scale, self.high * scale
        low, high = jnp.minimum(*ends), jnp.maximum(*ends)
        return Statistics(self.tokens, self.square * scale**2, self.absolute * jnp.abs(scale), low, high, moment)

    @property
    def norm(self) -> jax.Array:
        """`‖X_i‖₂` of every input."""
        return jnp.sqrt(self.square)

    @property
    def largest(self) -> jax.Array:
        """`max|x_i|` of every input."""
        return jnp.maximum(-self.low, self.high)

    @property
    def mean(self) -> jax.Array:
        """Mean `|x_i|` of every input."""
        return self.absolute / jnp.maximum(self.tokens, 1)


class Group(NamedTuple):
    """Products that read the same input, and what is known of it.

    Attributes:
      layer: path of the layer.
      kernels: `{path inside the layer: leaf}`, in order.
      chosen: those of them that the user's `targets` name.
      norm: path inside the layer of the norm whose output these products alone read, so that what divides their input
        can be folded into it; `None` where there is none (after the residual sum, in BERT, the stream reads it too).
      params: the layer's leaves by path, as they are now.
      statistics: of the input.
    """

    layer: str
    kernels: dict[str, Any]
    chosen: tuple[str, ...]
    norm: str | None
    params: dict[str, Any]
    statistics: Statistics


Rule = Callable[[Group], Mapping[str, Any]]


def calibrate(
    model: Any,
    params: Tree,
    calibration: Calibration,
    rule: Rule,
    *,
    who: str,
    targets: str = KERNELS,
    moment: bool = False,
) -> dict[str, Any]:
    """Walks `model` with the calibration's text and replaces what `rule` returns, group after group.

    Args:
      model, params: canonical view; activations are float32, without dropout.
      rule: `Group -> {path inside the layer: new leaf}`.
      who: the method, for messages.
      targets: regex over paths; groups without a target are passed over.
      moment: whether the rule reads `XᵀX`.

    Raises:
      ValueError: for targets that match nothing or lie outside the layers, for calibration without a token, and, naming
        the layer, for inputs that are not finite.
    """
    if not calibration.batches:
        raise ValueError(f"{who}: the calibration data hold no row; see config.calibration")
    check_rules([(targets, None)], describe(params).values(), f"{who}: targets")
    flat = flatten(params)
    for path in [path for side in model.sides() for path in model.layer_paths(side)]:
        if not own_leaves(flat, path):
            raise ValueError(
                f"{who}: {path} shares the parameters of another layer, but is calibrated with inputs of its own; "
                f"calibrate before layers are shared"
            )
    groups = {path: layer_groups(path, flat, targets) for side in model.sides() for path in model.layer_paths(side)}
    reached = {f"{path}/{name}" for path, found in groups.items() for kernels in found for name in kernels}
    outside = [path for path in flat if matches(targets, path) and path not in reached]
    if outside:
        raise ValueError(
            f"{who}: targets {targets!r} match {', '.join(outside[:3])}, whose inputs calibration does not see; it "
            f"sees the kernels inside the layers ({KERNELS!r})"
        )
    last = [path for path, found in groups.items() if found][-1]
    finished: list[Any] = [None] * len(calibration.batches)
    for side in model.sides():
        streams = [
            _embed(model, side, params, {n: jnp.asarray(a) for n, a in batch.items()}, source)
            for batch, source in zip(calibration.batches, finished, strict=True)
        ]
        for path in model.layer_paths(side):
            layer, own = model.layer(path), own_leaves(flat, path)
            for kernels in groups[path]:
                statistics = observe(model, path, own, streams, kernels[0], moment, who)
                group = Group(
                    path,
                    {name: own[name] for name in kernels},
                    tuple(name for name in kernels if matches(targets, f"{path}/{name}")),
                    norm_before(kernels[0], layer),
                    own,
                    statistics,
                )
                own = own | dict(rule(group))
            flat |= {f"{path}/{name}": leaf for name, leaf in own.items()}
            if path == last:
                return unflatten(flat)
            streams = [_advance(model, layer, unflatten(own), stream) for stream in streams]
        finished = [model.finish(params, stream, side) for stream in streams]
    return unflatten(flat)


def own_leaves(flat: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The leaves of a layer by path inside it."""
    return {name.removeprefix(f"{path}/"): leaf for name, leaf in flat.items() if name.startswith(f"{path}/")}


def layer_groups(path: str, flat: Mapping[str, Any], targets: str) -> list[list[str]]:
    """Kernels of a layer that share an input, for every such group with a target."""
    groups = [[f"{name}/kernel" for name in names if f"{path}/{name}/kernel" in flat] for names, _ in PRODUCTS]
    return [kernels for kernels in groups if any(matches(targets, f"{path}/{name}") for name in kernels)]


def norm_before(kernel: str, layer: Any) -> str | None:
    """The norm that a product reads, where only its group does."""
    norm = next(norm for names, norm in PRODUCTS if kernel.removesuffix("/kernel") in names)
    return norm if layer.pre_norm else None


def observe(
    model: Any, path: str, own: Mapping[str, Any], streams: Sequence[Any], kernel: str, moment: bool, who: str
) -> Statistics:
    """Statistics of what one kernel of a layer reads, over all streams."""
    layer, params = model.layer(path), unflatten(own)
    found = [_inputs(model, layer, kernel, moment, params, stream) for stream in streams]
    statistics = functools.reduce(Statistics.add, found)
    if not int(statistics.tokens):
        raise ValueError(f"{who}: the calibration data hold no token that {path}/{kernel} reads")
    if not np.isfinite(np.asarray(statistics.square)).all():
        raise ValueError(
            f"{who}: the inputs of {path}/{kernel} are not finite; the model itself, or what was compressed before "
            f"this layer, gives numbers beyond float32 on the calibration data"
        )
    return statistics


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _inputs(model: Any, layer: Any, kernel: str, moment: bool, params: Tree, stream: Any) -> Statistics:
    """Statistics of one product's inputs; the compiler leaves out what comes after it in the layer."""
    seen: dict[str, jax.Array] = {}
    flat = flatten(params)
    observed = unflatten(flat | {kernel: Observed(flat[kernel], kernel)})
    model.block(layer, observed, stream, ctx=Context(observe=seen.__setitem__))
    return Statistics.of(seen[kernel], model.valid(stream, kernel), moment)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(model: Any, layer: Any, params: Tree, stream: Any) -> Any:
    return model.block(layer, params, stream)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(model: Any, side: str, params: Tree, batch: Mapping[str, jax.Array], source: Any) -> Any:
    return model.embed(params, batch, side, source)


def each(change: Callable[[str, Any, Statistics], Any]) -> Rule:
    """The rule that changes every target on its own: `change(path, leaf, statistics) -> leaf`.

    Below an `InputScaled` the leaf is its base, and the statistics are those of the scaled inputs.
    """

    def inside(path: str, leaf: Any, statistics: Statistics) -> Any:
        if isinstance(leaf, InputScaled):
            return leaf.replace(base=inside(path, leaf.base, statistics.scaled(leaf.scale)))
        return change(path, leaf, statistics)

    def rule(group: Group) -> dict[str, Any]:
        return {name: inside(f"{group.layer}/{name}", group.kernels[name], group.statistics) for name in group.chosen}

    return rule


def matrix(who: str, path: str, leaf: Any) -> jax.Array:
    """The float32 matrix of a leaf whose entries may be changed: an array, or one under a mask.

    Raises:
      ValueError: for any other Weight, whose parts would no longer say what it is.
    """
    inner = leaf.base if isinstance(leaf, Masked) else leaf
    if isinstance(inner, Weight):
        raise ValueError(
            f"{who}: {path} is a {type(inner).__name__}; its entries cannot be set one by one: put {who} before what "
            f"made it, bake it first, or leave it out of the targets"
        )
    return materialize(leaf).astype(jnp.float32)
