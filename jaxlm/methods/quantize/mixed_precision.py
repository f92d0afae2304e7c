"""Mixed precision: every matrix gets the number format that it needs, and the whole fits a size."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxlm.core import (
    LM,
    NO_DATA,
    Network,
    Quantized,
    Scheme,
    SurgeryContext,
    Tree,
    Weight,
    flatten,
    materialize,
    text_rows,
    unflatten,
)
from jaxlm.methods.quantize.formats import (
    TARGETS,
    change_matrices,
    channel_of,
    check_targets,
    formats,
    is_target,
    stored_bytes,
)

FORMATS: tuple[Mapping[str, Any], ...] = (
    {"bits": "int4", "group": 32},
    {"bits": "int8"},
)
"""What a matrix may be stored in, by the fields of a Scheme."""


class Choice(NamedTuple):
    """One way to store a leaf: the bytes it takes and what it costs in quality."""

    bytes: int
    error: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int]:
    """The index of a choice for every leaf, so that the sum of errors is small and the sum of bytes at most `budget`.

    Every leaf begins with its cheapest choice. Along the lower convex hull of its choices (error over bytes) each step
    to a larger one buys a certain error per byte, less and less; over all leaves the steps are taken in that order, as
    long as they fit. Where a step of the hull is the last that fits exactly, no allocation of that size is better. What
    is left is spent on single steps that still fit.

    Raises:
      ValueError: when even the cheapest choices take more.

    >>> small, large = Choice(1, 9.0), Choice(3, 1.0)
    >>> allocate({"a": [small, large], "b": [Choice(1, 2.0), large]}, budget=5)
    {'a': 1, 'b': 0}
    """
    by_bytes = {
        path: sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].error))
        for path, options in choices.items()
    }
    taken = {path: indices[0] for path, indices in by_bytes.items()}
    spent = sum(choices[path][i].bytes for path, i in taken.items())
    if spent > budget:
        raise ValueError(f"{budget} bytes are too few: the smallest formats take {spent}")

    # Steps along the hulls, those that buy the most error per byte first.
    steps = []
    for path, indices in by_bytes.items():
        hull = _hull([choices[path][i] for i in indices])
        for i, j in itertools.pairwise(indices[position] for position in hull):
            a, b = choices[path][i], choices[path][j]
            steps.append(((b.error - a.error) / (b.bytes - a.bytes), path, i, j))
    for _, path, i, j in sorted(steps):
        extra = choices[path][j].bytes - choices[path][i].bytes
        # A leaf whose step did not fit stays where it is: the next one starts from where that would have led.
        if taken[path] == i and spent + extra <= budget:
            taken[path], spent = j, spent + extra

    # Single steps into what is left.
    while better := _fitting(choices, taken, budget - spent):
        path, index = better
        spent += choices[path][index].bytes - choices[path][taken[path]].bytes
        taken[path] = index
    return taken


def _hull(points: Sequence[Choice]) -> list[int]:
    """Indices of the lower convex hull of points in order of bytes, each with less error than the one before."""
    hull: list[int] = []
    for i, point in enumerate(points):
        if hull and (point.error >= points[hull[-1]].error or point.bytes == points[hull[-1]].bytes):
            continue
        while len(hull) > 1:
            a, b = points[hull[-2]], points[hull[-1]]
            if (a.error - b.error) * (point.bytes - b.bytes) > (b.error - point.error) * (b.bytes - a.bytes):
                break
            hull.pop()
        hull.append(i)
    return hull


def _fitting(choices: Mapping[str, Sequence[Choice]], taken: Mapping[str, int], room: int) -> tuple[str, int] | None:
    """The change of one leaf that lowers the error most and fits into the room."""
    changes = [
        (options[i].error - options[taken[path]].error, path, i)
        for path, options in choices.items()
        for i in range(len(options))
        if options[i].bytes - options[taken[path]].bytes <= room and options[i].error < options[taken[path]].error
    ]
    return min(changes)[1:] if changes else None


def mixed_precision(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    budget: float,
    choices: Sequence[Mapping[str, Any]] = FORMATS,
    dynamic: bool | None = None,
    targets: str = TARGETS,
) -> LM:
    """Surgery: stores every target in the one of several formats that keeps the model's outputs, within a size.

    Each target is quantized to each format alone, and its error is what that does to the model's outputs on the
    calibration text: `KL(p ‖ p̂)` a prediction in nats, of the model against the one with this matrix quantized (half
    the squared difference where the output is one number). Errors are added up as if they were independent, and
    `allocate` spends the bytes. A target may also stay as it is, at the size that it has.

    Source: the trade of Yao et al. 2020, HAWQ-V3, arXiv:2011.10680, errors measured instead of estimated from
    curvature.

    When: one format is too coarse for a few matrices, and calibration data can tell which.

    Args:
      budget: bytes of the model's parameters afterwards, as a share of what they are now.
      choices: formats, by the fields of a Scheme: `({"bits": "int4", "group": 32}, {"bits": "int8"})`.
      dynamic: products quantize their activations too, a token at a time; `None`: of int8 weights.
      targets: regex over paths.

    Returns:
      the model with Quantized leaves.

    Raises:
      ValueError: for a budget that the smallest formats exceed, telling what they need.
    """
    outputs_of = _outputs(lm.network, context.calibration(lm).batches)
    exact = outputs_of(lm.params)
    flat = flatten(lm.params)

    def error(path: str, quantized: Float[Array, "rows columns"]) -> float:
        changed = outputs_of(unflatten(flat | {path: quantized}))
        return sum(_divergence(p, q) for p, q in zip(exact, changed, strict=True)) / max(sum(map(len, exact)), 1)

    return _mix("mixed_precision", lm, error, budget=budget, choices=choices, dynamic=dynamic, targets=targets)


def mixed_precision_weights(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    budget: float,
    choices: Sequence[Mapping[str, Any]] = FORMATS,
    dynamic: bool | None = None,
    targets: str = TARGETS,
) -> LM:
    """Surgery: `mixed_precision` without data: the error of a format is `‖W - Ŵ‖² / ‖W‖²`, the noise in its product.

    Source: as for `mixed_precision`.

    When: as for `mixed_precision`, where there is no calibration data.

    Args:
      budget, choices, dynamic, targets: as for `mixed_precision`.
    """
    flat = flatten(lm.params)

    def error(path: str, quantized: Float[Array, "rows columns"]) -> float:
        dense = materialize(flat[path]).astype(jnp.float32)
        return float(jnp.sum(jnp.square(dense - quantized)) / jnp.maximum(jnp.sum(jnp.square(dense)), 1e-30))

    return _mix("mixed_precision_weights", lm, error, budget=budget, choices=choices, dynamic=dynamic, targets=targets)


def _mix(
    who: str,
    lm: LM,
    error: Callable[[str, jax.Array], float],
    *,
    budget: float,
    choices: Sequence[Mapping[str, Any]],
    dynamic: bool | None,
    targets: str,
) -> LM:
    """The model with every target in the format that `allocate` gives it.

    Args:
      who: the method, for messages.
      error: `(path, the matrix that the codes stand for) -> error` of one target stored in another format.
    """
    check_targets(lm.params, targets, who)
    if not 0 < budget <= 1:
        raise ValueError(f"{who}: budget must be a share in (0, 1], not {budget}")
    schemes = _schemes(who, choices, dynamic)
    flat = flatten(lm.params)

    # Of every target: to stay as it is, then each of the formats.
    options: dict[str, list[Choice]] = {}
    for path in [path for path, leaf in flat.items() if is_target(path, leaf, targets)]:
        options[path] = [Choice(stored_bytes(flat[path]), 0.0)]
        for scheme, inputs in schemes:
            stored = _stored(path, flat[path], scheme, inputs)
            options[path].append(Choice(stored_bytes(stored), error(path, stored.materialize())))

    # What is no target takes its share of the budget first.
    rest = sum(stored_bytes(leaf) for path, leaf in flat.items() if path not in options)
    total = rest + sum(as_it_is.bytes for as_it_is, *_ in options.values())
    try:
        taken = allocate(options, int(budget * total) - rest)
    except ValueError as problem:
        least = rest + sum(min(choice.bytes for choice in of_target) for of_target in options.values())
        raise ValueError(
            f"{who}: budget {budget} of {total} bytes cannot be met, the least is {least / total:.3f} ({problem}, "
            f"what is no target {rest})"
        ) from None
    quantized = {path: _stored(path, flat[path], *schemes[index - 1]) for path, index in taken.items() if index}
    return lm.replace(params=unflatten(flat | quantized))


def _schemes(
    who: str, choices: Sequence[Mapping[str, Any]], dynamic: bool | None
) -> list[tuple[Scheme, Scheme | None]]:
    """The formats of weights and activations behind the fields of every choice.

    Raises:
      ValueError: for a field that a choice does not have, and formats that do not exist.
    """
    defaults = {"bits": "int8", "group": None, "symmetric": True}
    schemes = []
    for choice in choices:
        if unknown := choice.keys() - defaults.keys():
            raise ValueError(f"{who}: a choice has no field {min(unknown)!r}; known: {', '.join(defaults)}")
        schemes.append(formats(who, **{**defaults, **choice}, dynamic=dynamic))
    return schemes


def _stored(path: str, leaf: Any, scheme: Scheme, inputs: Scheme | None) -> Weight:
    """A target as codes."""
    channel = channel_of(path)
    quantized = lambda w: Quantized.of(materialize(w), scheme, activations=inputs, channel=channel)  # noqa: E731
    return change_matrices(leaf, quantized)


def _outputs(network: Network, batches: Sequence[Mapping[str, np.ndarray]]) -> Callable[[Tree], list[np.ndarray]]:
    """`params -> outputs of every batch`, rows of log-probabilities (or of one number) `[predictions, classes]`.

    Of sequences, only real tokens count.
    """

    @jax.jit
    def run(params: Tree, batch: Mapping[str, jax.Array]) -> Float32[Array, "..."]:
        logits = network.forward(params, batch)["logits"]
        return logits if logits.shape[-1] == 1 else jax.nn.log_softmax(logits)

    def rows(params: Tree, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        outputs = np.asarray(run(params, {name: a for name, a in batch.items() if not name.endswith("labels")}))
        if outputs.ndim == 3:
            batch, side = text_rows(batch), "decoder_" if "decoder_input_ids" in batch else ""
            mask = batch.get(f"{side}segment_ids", batch.get(f"{side}attention_mask", np.ones(outputs.shape[:2])))
            return outputs[np.asarray(mask) > 0]
        return outputs

    return lambda params: [rows(params, batch) for batch in batches]


def _divergence(p: Float[np.ndarray, "predictions classes"], q: Float[np.ndarray, "predictions classes"]) -> float:
    """`Σ KL(p ‖ q)` over rows of log-probabilities, or half the squared difference of single numbers."""
    if p.shape[-1] == 1:
        return float(0.5 * np.square(p - q).sum())
    return float(np.sum(np.exp(p) * np.where(np.isfinite(p), p - q, 0)))
