"""Learned gates: hard-concrete switches under an augmented Lagrangian that holds a target size or latency."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int

from jaxlm.core import (
    LM,
    ArrayInfo,
    Axes,
    Batch,
    Context,
    Gate,
    Loss,
    Method,
    MethodInit,
    Site,
    Step,
    Term,
    Tree,
    components,
    flatten,
    is_stacked,
    nearest,
    unflatten,
)
from jaxlm.methods.prune.structured.gates import GATE_PATHS, best, open_gates, switches, widths
from jaxlm.methods.prune.structured.hard_concrete import Constraint, HardConcrete
from jaxlm.methods.prune.structured.latency import Curve, Table, table_at
from jaxlm.methods.prune.structured.scores import unstacked
from jaxlm.methods.prune.structured.shrink import FOLDED, shrink
from jaxlm.methods.prune.structured.width import STREAM

CONSTRAINT = "l0/constraint"
START = 2.5
"""`log α` at first: a deterministic pass has every gate fully open, a random one 98% of them."""

LARGEST = math.log(100.0)
"""Bound of `|log α|`: beyond it a gate hardly has a gradient, and would not find its way back."""

ASCENT, STIFFNESS = 1.0, 1000.0
"""What the multiplier λ gains in a step for an excess of 1; and μ, which answers at once where λ has yet to grow, and
keeps it from swinging: a loss of some nats, spread over many gates, holds against less."""

Shares = Mapping[str, Float[Array, ""]]
"""Expected open share of every gate, by canonical path."""


def l0(
    *,
    size: float | None = None,
    latency: float | None = None,
    table: str = "",
    batch_size: int = 1,
    length: int = 128,
    targets: Sequence[str] = ("heads", "ffn"),
    begin: int = 0,
    end: int,
    speed: float = 300.0,
) -> Method:
    """Learns which gates stay open: `min_θ,α max_λ  L + λ (s - t) + μ/2 (s - t)²`.

    `s(α)` is the expected share of what the gates could remove: of parameters (`size`), or of the layers' seconds
    (`latency`) by a table of times measured on this machine. `t` falls linearly from 1 at step `begin` to the target at
    `end`; training goes on after that. λ grows by `s - t` in every step, μ is fixed. Evaluation is deterministic: of
    every gate as many entries close as are expected to, the others are as far open as `log α` says. Baking folds that
    into the weights and shrinks.
    Sources: Louizos et al. 2018, arXiv:1712.01312; Wang et al. 2020, arXiv:1910.04732; Xia et al. 2022,
    arXiv:2204.00408.

    When: training itself should find how many heads and units each layer keeps, for a share of the size or of the
    time measured on this machine; at the same size `structured` lost less in short training.

    Args:
      size: share that stays of the parameters that gates can remove.
      latency: share that stays of the layers' time.
      table: a JSON file, which `latency` needs: read, or measured and written there, so that a run that is resumed goes
        on with the same numbers.
      batch_size, length: the shape whose latency counts.
      targets: of `heads` (KV groups), `ffn` (units), `layers` and `hidden` (not for latency).
      begin, end: steps in which the target is approached.
      speed: gates learn so many times as fast as weights.

    Raises:
      ValueError: not exactly one of size and latency, or no such target.
    """
    goal = size if latency is None else latency
    if goal is None or (size is not None and latency is not None):
        raise ValueError("l0 needs exactly one of size and latency")
    if not 0 < goal <= 1:
        raise ValueError(
            f"l0: {'size' if latency is None else 'latency'} is the share that stays, in (0, 1], not {goal}"
        )
    for kind in targets:
        if kind not in GATE_PATHS:
            raise ValueError(f"l0: unknown target {kind!r}; {nearest(kind, GATE_PATHS)}")
    if latency is not None and (not table or "hidden" in targets):
        raise ValueError("l0: a latency needs table='FILE.json', and knows no hidden width")
    if not end > begin >= 0 or speed <= 0:
        raise ValueError(f"l0: steps begin={begin} to end={end} and speed={speed} must be positive")
    final = float(goal)

    def init(key: jax.Array, lm: LM) -> MethodInit:
        for path, leaf in flatten(lm.params).items():
            if _folds_gates(path, targets) and any(c.role == "codes" for c in components(leaf, (None, None)).values()):
                raise ValueError(f"l0: {path} holds codes, into which a half-open gate cannot go; prune, then quantize")
        lm = open_gates(lm, targets, make=lambda ones: HardConcrete(ones * (START / speed), speed))
        if latency is None:
            expected: ExpectedSize | ExpectedLatency = expected_size(lm.params, lm.axes)
        else:
            expected = expected_latency(lm.params, lm.config, table_at(table, lm.network, batch_size, length))
        params = unflatten(flatten(lm.params) | {CONSTRAINT: Constraint(jnp.ones(()), jnp.zeros(()))})
        gated = lm.replace(params=params, axes={**lm.axes, CONSTRAINT: ()})
        return MethodInit(gated, constants={"l0": expected})

    def trainable(info: ArrayInfo) -> bool | None:
        return True if _is_gate_score(info) else None

    def loss(inner: Loss) -> Loss:
        def fn(params: Tree, constants: dict, batch: Batch, ctx: Context):
            terms, outputs = inner.fn(params, constants, batch, ctx)
            left = constants["l0"](open_shares(params))
            constraint = params["l0"]["constraint"]
            excess, multiplier = left - constraint.target, constraint.multiplier
            penalty = multiplier * excess + STIFFNESS / 2 * jnp.square(excess)
            one = jnp.ones(())
            return {**terms, "l0": Term(penalty, one), "l0_left": Term(left, one, 0.0)}, outputs

        return inner._replace(fn=fn)

    def update(step: Step, grads: dict, constants: dict, number: Int[Array, ""]) -> Step:
        target = 1 - (1 - final) * jnp.clip((number - begin) / (end - begin), 0.0, 1.0)
        flat = flatten(step.params)
        for path, _, gate in switches(step.params):
            if isinstance(gate, HardConcrete):
                flat[path] = gate.replace(score=jnp.clip(gate.score, -LARGEST / speed, LARGEST / speed))
        # The multiplier does not go through the optimizer, whose rate falls as training ends.
        excess = constants["l0"](open_shares(unflatten(flat))) - target
        constraint = Constraint(target.astype(jnp.float32), flat[CONSTRAINT].multiplier + ASCENT * excess)
        return step._replace(params=unflatten(flat | {CONSTRAINT: constraint}))

    def eval_params(params: Tree, state: dict) -> Tree:
        return deterministic_gates(params)

    def bake(lm: LM, state: dict[str, Any]) -> LM:
        params = unflatten(
            {path: leaf for path, leaf in flatten(deterministic_gates(lm.params)).items() if path != CONSTRAINT}
        )
        axes = {path: names for path, names in lm.axes.items() if path != CONSTRAINT}
        return shrink(lm.replace(params=params, axes=axes))

    def claims(params: Tree) -> set[tuple[str, str]]:
        return widths(params, targets) | {(path, "bits") for path in flatten(params) if _folds_gates(path, targets)}

    return Method(
        init=init, trainable=trainable, loss=loss, update=update, eval_params=eval_params, bake=bake, claims=claims
    )


def _folds_gates(path: str, targets: Sequence[str]) -> bool:
    """Whether baking folds half-open gates into a leaf, which must not be quantized before."""
    product = re.fullmatch(r"(?:.*/)?layers_\d+/(attention|cross_attention|mlp)/(\w+)/kernel", path)
    if product is None or product[2] != FOLDED[product[1]]:
        return False
    return ("ffn" if product[1] == "mlp" else "heads") in targets


def _is_gate_score(info: ArrayInfo) -> bool:
    """Whether an array is what a learned gate is opened by."""
    return info.role == "scale" and (info.path == "hidden" or info.path.endswith("/gate"))


def open_shares(params: Tree) -> dict[str, Float[Array, ""]]:
    """Expected open share of every learned gate, by canonical path, from either view."""
    shares = {}
    for path, _, switch in switches(params):
        if isinstance(switch, HardConcrete):
            probability = switch.probability()
            leading = 1 if is_stacked(path) else 0
            shares[path] = jnp.mean(probability, axis=tuple(range(leading, probability.ndim)))
    return unstacked(shares)


class ExpectedSize(struct.PyTreeNode):
    """The expected share of the parameters that gates can remove, as a function; a constant of the step.

    Attributes:
      sizes: `(gates, parameters)`: how many parameters shrink with these gates, by their canonical paths. Static.
    """

    sizes: tuple[tuple[tuple[str, ...], int], ...] = struct.field(pytree_node=False)

    def __call__(self, shares: Shares) -> Float32[Array, ""]:
        whole = sum(size for _, size in self.sizes)
        left = jnp.zeros(())
        for gates, size in self.sizes:
            left = left + (size / whole) * math.prod((shares[gate] for gate in gates), start=jnp.ones(()))
        return left


def expected_size(params: Tree, axes: Mapping[str, Axes]) -> ExpectedSize:
    """The expected share of the parameters that gates can remove.

    An array shrinks by the open share of every gated axis that it carries, and goes with its layer:
    `Σ_arrays size · Π_gates share`, over the same with all gates open.

    Args:
      params: canonical view, with gates; axes: names by path.
    """
    flat = flatten(params)
    gates = {path for path, leaf in flat.items() if isinstance(leaf, HardConcrete)}
    sizes: dict[tuple[str, ...], int] = {}
    for path, leaf in flat.items():
        if isinstance(leaf, Site):
            continue
        names = [name for entry in axes[path] for name in (entry if isinstance(entry, tuple) else (entry,))]
        layer = re.match(r"((?:.*/)?layers_\d+)/", path)
        module = re.match(r"((?:.*/)?layers_\d+/((?:cross_)?attention|mlp))/", path)
        candidates = ["hidden" for name in names if name in STREAM]
        candidates += [f"{layer[1]}/gate"] if layer else []
        if module and f"{module[1]}/gate" in gates and _carries(module[2], flat[f"{module[1]}/gate"], names):
            candidates += [f"{module[1]}/gate"]
        shrinks_with = tuple(sorted(gate for gate in candidates if gate in gates))
        if shrinks_with:
            sizes[shrinks_with] = sizes.get(shrinks_with, 0) + math.prod(leaf.shape)
    return ExpectedSize(tuple(sizes.items()))


def _carries(module: str, gate: HardConcrete, names: Sequence[Any]) -> bool:
    """Whether an array with these axis names shrinks with the gate of its module, `mlp` or an attention."""
    if module == "mlp":
        return "ffn" in names
    return ("q_per_kv" if gate.score.shape[-2] > 1 else "kv_heads") in names


class ExpectedLatency(struct.PyTreeNode):
    """The expected share of the layers' time, as a function; a constant of the step.

    Attributes:
      layers: `(path, heads, units)` of every layer that is run, with all gates open. Static.
      layer, heads, ffn: seconds, see `Table`. Static.
      dense: seconds of all layers with all gates open, by which those of a pass are divided. Static.
    """

    layers: tuple[tuple[str, int, int], ...] = struct.field(pytree_node=False)
    layer: float = struct.field(pytree_node=False)
    heads: Curve = struct.field(pytree_node=False)
    ffn: Curve = struct.field(pytree_node=False)
    dense: float = struct.field(pytree_node=False, default=1.0)

    def __call__(self, shares: Shares) -> Float32[Array, ""]:
        return self.seconds(shares) / self.dense

    def seconds(self, shares: Shares) -> Float32[Array, ""]:
        """Of all layers; a gate without a share is open."""
        spent = jnp.zeros(())
        for path, heads, units in self.layers:
            heads_left = heads * shares.get(f"{path}/attention/gate", jnp.ones(()))
            units_left = units * shares.get(f"{path}/mlp/gate", jnp.ones(()))
            time = self.layer + self.heads(heads_left) + self.ffn(units_left)
            spent = spent + shares.get(f"{path}/gate", jnp.ones(())) * time
        return spent


def expected_latency(params: Tree, config: Any, table: Table) -> ExpectedLatency:
    """The expected share of the layers' time: `Σ_layers p_l (c + A(E heads) + F(E units))`, over that of the whole.

    A and F are interpolated in the table, so their slope says what one more head or unit costs on this machine.

    Args:
      params: canonical view, with gates.
    """
    flat = flatten(params)
    counts = {path: leaf.score.size for path, leaf in flat.items() if isinstance(leaf, HardConcrete)}
    layers = []
    for i, owner in enumerate(config.owners()):
        # Without a gate a module is whole.
        groups, heads, path = config.num_kv_heads[i], config.num_heads[i], f"layers_{owner}"
        all_heads = counts.get(f"{path}/attention/gate", heads if groups == 1 else groups)
        layers.append((path, all_heads, counts.get(f"{path}/mlp/gate", config.ffn_size[i])))
    expected = ExpectedLatency(tuple(layers), table.layer, table.heads, table.ffn)
    with jax.ensure_compile_time_eval():  # also where shapes are traced
        return expected.replace(dense=float(expected.seconds({})))


def deterministic_gates(params: Tree) -> dict[str, Any]:
    """Deterministic gates in the place of learned ones, in either view.

    Of every row of `n` entries the `round(Σ (1 - P(open)))` with the smallest `log α` close, and those whose
    deterministic position is 0; one stays. Heads and units keep their position between 0 and 1; layers (all of a stack
    are one row) and stream dimensions are then fully open.
    """
    flat = flatten(params)
    learned = {path: (kind, leaf) for path, kind, leaf in switches(params) if isinstance(leaf, HardConcrete)}
    for path, (kind, leaf) in learned.items():
        if kind == "layers":
            continue
        shape = leaf.score.shape
        rows = shape[:-3] if kind == "heads" else shape[:-1]
        position = _positions(leaf.log_alpha.reshape(*rows, -1), leaf.probability().reshape(*rows, -1))
        value = position if kind != "hidden" else (position > 0).astype(jnp.float32)
        flat[path] = Gate(value.reshape(shape))
    layers = {path: leaf for path, (kind, leaf) in learned.items() if kind == "layers"}
    for stack in sorted({path.rpartition("layers_")[0] for path in layers}):
        of_stack = {path: leaf for path, leaf in layers.items() if path.rpartition("layers_")[0] == stack}
        position = _positions(
            _row(leaf.log_alpha for leaf in of_stack.values()), _row(leaf.probability() for leaf in of_stack.values())
        )
        start = 0
        for path, leaf in of_stack.items():
            of_gate = position[start : start + leaf.score.size].reshape(leaf.score.shape)
            flat[path] = Gate((of_gate > 0).astype(jnp.float32))
            start += leaf.score.size
    return unflatten(flat)


def _row(values: Iterable[Float[Array, "..."]]) -> Float[Array, "entries"]:
    """The entries of several gates as one row."""
    return jnp.concatenate([value.reshape(-1) for value in values])


def _positions(
    log_alpha: Float[Array, "*rows entries"], probability: Float[Array, "*rows entries"]
) -> Float[Array, "*rows entries"]:
    """Deterministic positions, exactly 0 where closed."""
    closed = jnp.round(jnp.sum(1 - probability, axis=-1)).astype(jnp.int32)
    size = log_alpha.shape[-1]
    position = HardConcrete(log_alpha).open(Context())
    is_open = best(log_alpha, jnp.maximum(size - closed, 1)) & (position > 0)
    last_open = best(log_alpha, jnp.ones(log_alpha.shape[:-1], jnp.int32))
    return jnp.where(last_open, jnp.maximum(position, 1e-3), jnp.where(is_open, position, 0.0))
