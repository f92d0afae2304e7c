"""Calibration: walks a model layer by layer for the methods that must see inputs, and changes it on the way.

Within a layer the products come in the order in which data pass them, those that read the same input together: query,
key and value; output; gate and up; down. Before each group the layer runs again as far as this group, so that a rule
sees inputs that have passed everything compressed before it, in this layer and in those below.

A *rule* receives a `Group` and returns the leaves of the layer that it replaces.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxlm.core import (
    LM,
    Context,
    InputScaled,
    Masked,
    Network,
    SurgeryContext,
    Tree,
    Weight,
    check_rules,
    describe,
    flatten,
    matches,
    materialize,
    unflatten,
)
from jaxlm.methods.observed import Observed

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


class Statistics(NamedTuple):
    """Statistics of the inputs `X [tokens, in]` of a product, padding left out.

    Attributes:
      tokens: how many.
      square, absolute: `Σ x²` and `Σ|x|` of every input; low, high: its smallest and largest value.
      hessian: the Hessian `H = XᵀX`, where it was asked for.
    """

    tokens: Int[Array, ""]
    square: Float32[Array, "in"]
    absolute: Float32[Array, "in"]
    low: Float32[Array, "in"]
    high: Float32[Array, "in"]
    hessian: Float32[Array, "in in"] | None = None

    @classmethod
    def of(cls, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"], hessian: bool = False) -> "Statistics":
        """Those of the tokens of `x` that are valid.

        >>> x = jnp.array([[3.0, -1.0], [0.0, 1.0], [9.0, 9.0]])
        >>> statistics = Statistics.of(x, jnp.array([True, True, False]), hessian=True)
        >>> statistics.norm.tolist(), statistics.mean.tolist(), statistics.hessian.tolist()
        ([3.0, 1.4142135381698608], [1.5, 1.0], [[9.0, -3.0], [-3.0, 2.0]])
        """
        counted = valid.reshape(-1, 1)
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        X = jnp.where(counted, x, 0)
        low, high = (jnp.where(counted, x, jnp.inf).min(axis=0), jnp.where(counted, x, -jnp.inf).max(axis=0))
        # The highest precision: elsewhere than on a CPU, float32 products are rounded to fewer bits by default.
        H = jnp.matmul(X.T, X, precision=jax.lax.Precision.HIGHEST) if hessian else None
        square = jnp.sum(jnp.square(X), axis=0) if H is None else jnp.diagonal(H)
        return cls(jnp.sum(valid), square, jnp.sum(jnp.abs(X), axis=0), low, high, H)

    def add(self, more: "Statistics") -> "Statistics":
        """Those of both sets of tokens."""
        H = None if self.hessian is None or more.hessian is None else self.hessian + more.hessian
        return Statistics(
            self.tokens + more.tokens,
            self.square + more.square,
            self.absolute + more.absolute,
            jnp.minimum(self.low, more.low),
            jnp.maximum(self.high, more.high),
            H,
        )

    def scaled(self, scale: Float[Array, "in"]) -> "Statistics":
        """Those of the inputs times `scale`."""
        H = None if self.hessian is None else self.hessian * scale[:, None] * scale
        ends = self.low * scale, self.high * scale
        low, high = jnp.minimum(*ends), jnp.maximum(*ends)
        return Statistics(self.tokens, self.square * scale**2, self.absolute * jnp.abs(scale), low, high, H)

    @property
    def norm(self) -> Float32[Array, "in"]:
        """`‖X_i‖₂` of every input."""
        return jnp.sqrt(self.square)

    @property
    def largest(self) -> Float32[Array, "in"]:
        """`max|x_i|` of every input."""
        return jnp.maximum(-self.low, self.high)

    @property
    def mean(self) -> Float32[Array, "in"]:
        """Mean `|x_i|` of every input."""
        return self.absolute / jnp.maximum(self.tokens, 1)


class Group(NamedTuple):
    """Products that read the same input, and its statistics.

    Attributes:
      layer: path of the layer.
      kernels: `{path inside the layer: leaf}`, in order.
      chosen: those of them that the user's `targets` name.
      norm: path inside the layer of the norm whose output these products alone read, so that what divides their input
        can be folded into it; `None` where there is none (after the residual sum, in BERT, the stream reads it too).
      params: the layer's leaves by path inside it, those of earlier groups changed already.
      statistics: of the input.
    """

    layer: str
    kernels: dict[str, Any]
    chosen: tuple[str, ...]
    norm: str | None
    params: dict[str, Any]
    statistics: Statistics


Rule = Callable[[Group], Mapping[str, Any]]
"""`Group -> {path inside the layer: new leaf}`."""


class LeafRule(Protocol):
    """What becomes of one target."""

    def __call__(self, path: str, leaf: Any, statistics: Statistics, /) -> Any:
        """The new leaf.

        Args:
          path: of the parameter in the model.
          statistics: of what the leaf is multiplied by.
        """


def calibrate(
    lm: LM, context: SurgeryContext, rule: Rule, *, who: str, targets: str = KERNELS, hessian: bool = False
) -> LM:
    """The model with what `rule` returns in the place of its kernels, group after group, on the calibration's text.

    Activations are float32, without dropout.

    Args:
      context: gives the calibration data.
      rule: see `Rule`.
      who: the method, for messages.
      targets: regex over paths; groups without a target are passed over.
      hessian: whether the rule reads the Hessian `XᵀX`.

    Raises:
      ValueError: for targets that match nothing or lie outside the layers, for calibration without a token, and, naming
        the layer, for inputs that are not finite.
    """
    network, flat = lm.network, flatten(lm.params)
    groups = groups_to_visit(network, flat, targets, who)
    batches = context.calibration(lm).batches
    if not batches:
        raise ValueError(f"{who}: the calibration data hold no row; see config.calibration")
    last_layer = [path for path, kernels in groups.items() if kernels][-1]
    encoded: list[Any] = [None] * len(batches)
    for side in network.sides():
        streams = [
            _embed(network, side, lm.params, {name: jnp.asarray(array) for name, array in batch.items()}, source)
            for batch, source in zip(batches, encoded, strict=True)
        ]
        for path in network.layer_paths(side):
            leaves = layer_leaves(flat, path)
            # Every group is observed behind the changes to those before it.
            for kernels in groups[path]:
                statistics = observe(network, path, kernels[0], leaves, streams, hessian=hessian, who=who)
                chosen = tuple(name for name in kernels if matches(targets, f"{path}/{name}"))
                norm = norm_before(kernels[0], network.layer(path))
                group = Group(path, {name: leaves[name] for name in kernels}, chosen, norm, leaves, statistics)
                leaves = leaves | dict(rule(group))
            flat |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
            if path == last_layer:
                return lm.replace(params=unflatten(flat))
            streams = [_advance(network, network.layer(path), unflatten(leaves), stream) for stream in streams]
        encoded = [network.finish(lm.params, stream, side) for stream in streams]
    return lm.replace(params=unflatten(flat))


def groups_to_visit(network: Network, flat: Mapping[str, Any], targets: str, who: str) -> dict[str, list[list[str]]]:
    """By path of the layer, in order, its groups of kernels with a target.

    Raises:
      ValueError: for targets that match nothing or lie outside the layers, or layers that share their parameters.
    """
    check_rules([(targets, None)], describe(unflatten(flat)).values(), f"{who}: targets")
    paths = [path for side in network.sides() for path in network.layer_paths(side)]
    for path in paths:
        if not layer_leaves(flat, path):
            raise ValueError(
                f"{who}: {path} shares the parameters of another layer, but is calibrated with inputs of its own; "
                f"calibrate before layers are shared"
            )
    groups = {path: layer_groups(path, flat, targets) for path in paths}
    reached = {f"{path}/{name}" for path, in_layer in groups.items() for kernels in in_layer for name in kernels}
    outside = [path for path in flat if matches(targets, path) and path not in reached]
    if outside:
        raise ValueError(
            f"{who}: targets {targets!r} match {', '.join(outside[:3])}, whose inputs calibration does not see; it "
            f"sees the kernels inside the layers ({KERNELS!r})"
        )
    return groups


def layer_leaves(flat: Mapping[str, Any], path: str) -> dict[str, Any]:
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
    network: Network,
    path: str,
    kernel: str,
    leaves: Mapping[str, Any],
    streams: Sequence[Any],
    *,
    hessian: bool,
    who: str,
) -> Statistics:
    """Statistics of what one kernel of a layer reads, over all streams.

    Raises:
      ValueError: for streams without a token, and inputs that are not finite.
    """
    layer, params = network.layer(path), unflatten(leaves)
    by_stream = [_inputs(network, layer, kernel, hessian, params, stream) for stream in streams]
    statistics = functools.reduce(Statistics.add, by_stream)
    if not int(statistics.tokens):
        raise ValueError(f"{who}: the calibration data hold no token that {path}/{kernel} reads")
    if not np.isfinite(np.asarray(statistics.square)).all():
        raise ValueError(
            f"{who}: the inputs of {path}/{kernel} are not finite; the model itself, or what was compressed before "
            f"this layer, gives numbers beyond float32 on the calibration data"
        )
    return statistics


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _inputs(network: Network, layer: Any, kernel: str, hessian: bool, params: Tree, stream: Any) -> Statistics:
    """Statistics of one product's inputs; the compiler leaves out what comes after it in the layer."""
    inputs: dict[str, jax.Array] = {}
    flat = flatten(params)
    observed = unflatten(flat | {kernel: Observed(flat[kernel], kernel)})
    network.block(layer, observed, stream, ctx=Context(observe=inputs.__setitem__))
    return Statistics.of(inputs[kernel], network.valid(stream, kernel), hessian)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(network: Network, layer: Any, params: Tree, stream: Any) -> Any:
    return network.block(layer, params, stream)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(network: Network, side: str, params: Tree, batch: Mapping[str, jax.Array], source: Any) -> Any:
    return network.embed(params, batch, side, source)


def per_leaf(change: LeafRule) -> Rule:
    """The rule that changes every target by itself.

    Below an `InputScaled` the leaf is its base, and the statistics are those of the scaled inputs.
    """

    def inside(path: str, leaf: Any, statistics: Statistics) -> Any:
        if isinstance(leaf, InputScaled):
            return leaf.replace(base=inside(path, leaf.base, statistics.scaled(leaf.scale)))
        return change(path, leaf, statistics)

    def rule(group: Group) -> dict[str, Any]:
        return {name: inside(f"{group.layer}/{name}", group.kernels[name], group.statistics) for name in group.chosen}

    return rule


def matrix(who: str, path: str, leaf: Any) -> Float32[Array, "in out"]:
    """The dense matrix of a leaf whose entries may be changed: an array, or one under a mask.

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
