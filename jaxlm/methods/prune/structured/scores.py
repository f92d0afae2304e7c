"""What heads, units, stream dimensions and layers are worth: by their weights, or by what passes their gates.

Scores of a gate are `[*rows, entries]`, rows of entries that compete: `[kv_heads]`, `[kv_heads, q_per_kv]`, `[ffn]`,
`[hidden]`; with a leading `layers` dimension in the run view. The gate of a whole layer has one score, `[]`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from jaxlm.core import (
    LM,
    SEGMENT,
    Axes,
    Context,
    Gate,
    Site,
    SurgeryContext,
    Tap,
    Tree,
    canonical_path,
    flatten,
    is_stacked,
    lookup,
    materialize,
    text_rows,
    total,
    unflatten,
)
from jaxlm.methods.prune.structured.width import STREAM


def scores_of(score: str, lm: LM, context: SurgeryContext) -> dict[str, Float[Array, "*rows entries"]]:
    """Scores of every open gate of a model, by path.

    Args:
      score: `magnitude`, or from calibration data `activation` or `taylor`.

    Raises:
      ValueError: an unknown score, one that reads data where the context has none, or scores that are no numbers.
    """
    if lookup({name: name for name in ("magnitude", "activation", "taylor")}, score, "score") == "magnitude":
        return magnitude_of(lm.params, lm.axes)
    return check_finite((activation_of if score == "activation" else taylor_of)(lm, context), score)


def check_finite(scores: dict[str, Any], score: str) -> dict[str, Any]:
    """The scores, or a ValueError that names the gates (or layers) where they are no numbers."""
    bad = [path for path, value in scores.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(
            f"the score {score!r} is no number at {', '.join(bad[:4])}{' and others' if len(bad) > 4 else ''}: the "
            "calibration has no token that counts there, or the model's activations overflow on it; choose other text "
            "in config.calibration"
        )
    return scores


def entries(path: str, value: Any) -> tuple[int, ...]:
    """Shape of the scores of a gate, from its value (or something of its shape).

    >>> entries("layers_0/attention/gate", jnp.ones((4, 1, 1)))
    (4,)
    >>> entries("layers_0-1/attention/gate", jnp.ones((2, 4, 3, 1)))
    (2, 4, 3)
    """
    if not path.endswith("attention/gate"):
        return tuple(value.shape)
    return tuple(value.shape[:-1] if value.shape[-2] > 1 else value.shape[:-2])


# By weights -----------------------------------------------------------------------------------------------------------


def head_scores(module: Mapping[str, Any], count: int, inputs: tuple[str, ...]) -> Float[Array, "{count}"]:
    """Importance of every head of an attention: the product of what goes in and what comes out.

    `(Σ_inputs ‖W‖²)^½ · ‖W_o‖` over the head's columns (rows, for o). The inputs are query, key and value of a KV
    group, or the query alone of one of the heads that share a group.
    """
    inwards = sum(
        jnp.sum(jnp.square(materialize(module[name]["kernel"])).reshape(-1, count, width), axis=(0, 2))
        for name in inputs
        for width in [module[name]["kernel"].shape[-1] // count]
    )
    outwards = jnp.sum(jnp.square(materialize(module["output"]["kernel"])).reshape(count, -1), axis=1)
    return jnp.sqrt(inwards * outwards)


def unit_scores(module: Mapping[str, Any]) -> Float[Array, "ffn"]:
    """Importance of every FFN unit: norm of its inward columns times norm of its outward row."""
    inwards = sum(
        jnp.sum(jnp.square(materialize(module[name]["kernel"])), axis=0)
        for name in ("gate_proj", "up")
        if name in module
    )
    return jnp.sqrt(inwards * jnp.sum(jnp.square(materialize(module["down"]["kernel"])), axis=1))


def stream_scores(params: Tree, axes: Mapping[str, Axes]) -> Float[Array, "hidden"]:
    """Importance of every dimension of the residual stream: norm of all weights that read or write it.

    Vectors (biases, norms) are left out; either view.
    """
    squares: jax.Array | float = 0.0
    for path, leaf in flatten(params).items():
        names = axes[canonical_path(path)]
        if isinstance(leaf, Site) or len(names) < 2 or not set(STREAM) & set(names):
            continue
        dense = materialize(leaf)
        stream = is_stacked(path) + next(i for i, name in enumerate(names) if name in STREAM)
        squares = squares + jnp.sum(jnp.square(dense), axis=[d for d in range(dense.ndim) if d != stream])
    return jnp.sqrt(jnp.asarray(squares))


def magnitude_of(params: Tree, axes: Mapping[str, Axes]) -> dict[str, Float[Array, "*rows entries"]]:
    """Scores by weights of every gate of heads, units and stream, in either view."""
    scores: dict[str, jax.Array] = {}
    for path, gate in flatten(params).items():
        if not isinstance(gate, Gate):
            continue
        if path == "hidden":
            scores[path] = stream_scores(params, axes)
            continue
        module = params
        for key in path.split("/")[:-1]:
            module = module[key]
        if path.endswith("mlp/gate"):
            score: Callable[[Any], jax.Array] = unit_scores
        elif path.endswith("attention/gate"):
            groups, queries, _ = gate.value.shape[-3:]
            inputs = ("query",) if queries > 1 else ("query", "key", "value")
            score = partial(head_scores, count=groups * queries, inputs=inputs)
        else:
            continue
        scores[path] = (jax.vmap(score) if is_stacked(path) else score)(module).reshape(entries(path, gate.value))
    return scores


# By data --------------------------------------------------------------------------------------------------------------


class Meter(Gate):
    """An open gate whose cotangent is no gradient but what passes: `Σ |x|` over valid tokens, in the gate's shape.

    So one backward pass reads all layers of a scan.

    Attributes:
      valid: 1 at tokens that count, 0 at others.
    """

    valid: Float32[Array, "*layers batch length"]

    def __call__(
        self, x: Float[Array, "batch length *channels"], ctx: Context
    ) -> Float[Array, "batch length *channels"]:
        return _metered(x, self.value, self.valid)


@jax.custom_vjp
def _metered(
    x: Float[Array, "batch length *channels"], value: Float[Array, "*gates"], valid: Float32[Array, "batch length"]
) -> Float[Array, "batch length *channels"]:
    return x * value.astype(x.dtype)


def _metered_forward(x: Array, value: Array, valid: Array):
    return _metered(x, value, valid), (x, value, valid)


def _metered_backward(residuals: tuple[Array, Array, Array], cotangent: Array):
    x, value, valid = residuals
    size = jnp.abs(x.astype(jnp.float32)) * valid.reshape(*valid.shape, *(1,) * (x.ndim - 2))
    summed = jnp.sum(size, axis=(0, 1))
    shared = tuple(d for d, n in enumerate(value.shape) if n == 1 and summed.shape[d] > 1)
    return jnp.zeros_like(x), jnp.sum(summed, axis=shared, keepdims=True), jnp.zeros_like(valid)


_metered.defvjp(_metered_forward, _metered_backward)


def valid_tokens(batch: Mapping[str, Shaped[Array, "..."]], side: str = "") -> Float32[Array, "batch length"]:
    """1 at tokens that count, 0 at others; `side` is `decoder_` for those of a decoder."""
    batch = text_rows(batch)
    ids = batch[f"{side}input_ids"]
    mask = batch.get(f"{side}segment_ids", batch.get(f"{side}attention_mask"))
    return jnp.ones(ids.shape) if mask is None else (jnp.asarray(mask) > 0).astype(jnp.float32)


def activation_of(lm: LM, context: SurgeryContext) -> dict[str, Float32[Array, "*rows entries"]]:
    """Mean size of what passes each gate, `E |x|` over valid tokens.

    Units: of the activation; heads: of the mixed values, mean over the head's width; stream dimensions: of the residual
    stream, mean over its depth. Source: Muralidharan et al. 2024, Minitron, arXiv:2407.14679 (activations' means).
    """
    config, run = lm.config, lm.network.run_view(lm.params)
    gates = {p: g.value for p, g in flatten(run).items() if p.endswith(("attention/gate", "mlp/gate"))}
    taps = stream_taps(config) if "hidden" in run else frozenset()

    @jax.jit
    def read(run: Tree, batch: Mapping[str, Array]):
        tokens = {side: valid_tokens(batch, side) for side in sides(config)}

        def passing(values: Mapping[str, Array]):
            metered = flatten(run)
            for path, value in values.items():
                valid = tokens[side_of(path, config)]
                lead = value.shape[:1] if is_stacked(path) else ()
                metered[path] = Meter(value, jnp.broadcast_to(valid, (*lead, *valid.shape)))
            outputs = lm.network.forward(unflatten(metered), batch, taps=taps)
            stream = jnp.zeros(())
            for tap, x in outputs["taps"].items():
                stream = stream + jnp.sum(jnp.abs(x) * tokens[tap_side(tap, config)][..., None], axis=(0, 1))
            return 0.0 * jnp.sum(outputs["last_hidden"]), stream

        sizes, stream = jax.grad(passing, has_aux=True)(gates)
        return sizes, stream, {side: jnp.sum(valid) for side, valid in tokens.items()}

    sizes, stream, tokens = sum_over_batches(read(run, arrays_of(batch)) for batch in context.calibration(lm).batches)
    scores = {}
    for path, size in sizes.items():
        width = config.head_dim if path.endswith("attention/gate") else 1
        scores[path] = (size / (tokens[side_of(path, config)] * width)).reshape(entries(path, size))
    if "hidden" in run:
        scores["hidden"] = stream / sum(tokens[tap_side(tap, config)] for tap in taps)
    return unstacked(scores)


def taylor_of(lm: LM, context: SurgeryContext) -> dict[str, Float32[Array, "*scores"]]:
    """How much the loss changes when a gate closes, to first order: `E |∂L/∂g|` over the rows of the batches.

    `L(g) - L(0) ≈ g ∂L/∂g` at g = 1. The absolute value is taken of every row, so that rows do not cancel.
    Sources: Molchanov et al. 2017, arXiv:1611.06440; Michel et al. 2019, arXiv:1905.10650.
    """
    run, loss = lm.network.run_view(lm.params), context.loss()
    gates = {path: leaf.value for path, leaf in flatten(run).items() if isinstance(leaf, Gate)}

    @jax.jit
    def read(run: Tree, batch: Mapping[str, Array]):
        def objective(values: Mapping[str, Array], row: Mapping[str, Array]):
            row = {name: value[None] for name, value in row.items()}
            gated = unflatten(flatten(run) | {path: Gate(value) for path, value in values.items()})
            terms = loss(lm.network.forward(gated, row), row)
            weights = {name: jax.lax.stop_gradient(term.weight) for name, term in terms.items()}
            return total(terms, weights), sum(weights.values())

        changes, weights = jax.vmap(jax.grad(objective, has_aux=True), in_axes=(None, 0))(gates, batch)
        return jax.tree.map(lambda g: jnp.sum(jnp.abs(g), axis=0), changes), jnp.sum(weights > 0)

    changes, rows = sum_over_batches(read(run, arrays_of(batch)) for batch in context.calibration(lm).batches)
    return unstacked({path: (g / jnp.maximum(rows, 1)).reshape(entries(path, g)) for path, g in changes.items()})


def block_influence(lm: LM, context: SurgeryContext) -> dict[str, Float32[Array, ""]]:
    """How much a layer turns the residual stream: `1 - E cos(x_in, x_out)` over valid tokens, by path of the layer.

    Source: Men et al. 2024, ShortGPT, arXiv:2403.03853.
    """
    taps, run = stream_taps(lm.config), lm.network.run_view(lm.params)

    @jax.jit
    def read(run: Tree, batch: Mapping[str, Array]):
        streams = lm.network.forward(run, batch, taps=taps)["taps"]
        turned, tokens = {}, {}
        for tap in taps:
            if tap.depth == 0:
                continue
            before, after = (streams[t].astype(jnp.float32) for t in (tap._replace(depth=tap.depth - 1), tap))
            length = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
            cosine = jnp.sum(before * after, axis=-1) / jnp.maximum(length, 1e-20)
            side = tap_side(tap, lm.config)
            valid = valid_tokens(batch, side)
            prefix = "" if not lm.config.encoder_decoder else "decoder/" if side else "encoder/"
            path = f"{prefix}layers_{tap.depth - 1}"
            turned[path], tokens[path] = jnp.sum((1 - cosine) * valid), jnp.sum(valid)
        return turned, tokens

    turned, tokens = sum_over_batches(read(run, arrays_of(batch)) for batch in context.calibration(lm).batches)
    return {path: turned[path] / tokens[path] for path in turned}


def sides(config: Any) -> tuple[str, ...]:
    """Prefixes of the token arrays of a batch that the model reads."""
    return ("", "decoder_") if config.encoder_decoder else ("",)


def side_of(path: str, config: Any) -> str:
    """Whose tokens pass a gate."""
    return "decoder_" if config.encoder_decoder and path.startswith("decoder/") else ""


def stream_taps(config: Any) -> frozenset[Tap]:
    """The residual stream before the first layer and after every one, of both stacks of an encoder-decoder."""
    if not config.encoder_decoder:
        return frozenset(Tap("hidden", i) for i in range(config.num_layers + 1))
    encoder = {Tap("encoder_hidden", i) for i in range(config.num_layers + 1)}
    return frozenset(encoder | {Tap("hidden", i) for i in range(config.num_decoder_layers + 1)})


def tap_side(tap: Tap, config: Any) -> str:
    """Whose tokens a tap shows."""
    return "decoder_" if config.encoder_decoder and not tap.site.startswith("encoder_") else ""


def arrays_of(batch: Mapping[str, Any]) -> dict[str, Shaped[Array, "..."]]:
    """A batch on the default device, without the loader's row numbers."""
    return {name: jnp.asarray(value) for name, value in batch.items() if name != "row"}


def sum_over_batches(statistics: Iterable[Any]) -> Any:
    """The sum of the statistics of all batches.

    Raises:
      ValueError: there are none.
    """
    total_of_batches = None
    for of_batch in statistics:
        first = total_of_batches is None
        total_of_batches = of_batch if first else jax.tree.map(jnp.add, total_of_batches, of_batch)
    if total_of_batches is None:
        raise ValueError("calibration has no batches: raise config.calibration.samples, or name another source")
    return total_of_batches


def unstacked(values: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """Values of gates of the run view, a leading `layers` dimension where they are stacked, by canonical path."""
    by_layer: dict[str, Array] = {}
    for path, value in values.items():
        segment = re.search(SEGMENT, path)
        if segment is None:
            by_layer[path] = value
            continue
        for i, of_layer in enumerate(value):
            by_layer[path.replace(segment[0], f"layers_{int(segment[1]) + i}")] = of_layer
    return by_layer
