"""Mixed precision: every matrix gets the number format that it needs, and the whole fits a size."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Axes, Quantized, Scheme, Tree, Weight, flatten, materialize, unflatten
from jaxlm.methods.quantize.formats import TARGETS, channel_of, check_targets, chosen, formats, inside, stored_bytes

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
    order = {path: sorted(range(len(own)), key=lambda i: (own[i].bytes, own[i].error)) for path, own in choices.items()}
    taken = {path: indices[0] for path, indices in order.items()}
    spent = sum(choices[path][i].bytes for path, i in taken.items())
    if spent > budget:
        raise ValueError(f"{budget} bytes are too few: the smallest formats take {spent}")
    steps = []
    for path, indices in order.items():
        hull = _hull([choices[path][i] for i in indices])
        for i, j in itertools.pairwise(indices[place] for place in hull):
            a, b = choices[path][i], choices[path][j]
            steps.append(((b.error - a.error) / (b.bytes - a.bytes), path, i, j))
    for _, path, i, j in sorted(steps):
        extra = choices[path][j].bytes - choices[path][i].bytes
        # A leaf whose step did not fit stays where it is: the next one starts from where that would have led.
        if taken[path] == i and spent + extra <= budget:
            taken[path], spent = j, spent + extra
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
        (own[i].error - own[taken[path]].error, path, i)
        for path, own in choices.items()
        for i in range(len(own))
        if own[i].bytes - own[taken[path]].bytes <= room and own[i].error < own[taken[path]].error
    ]
    return min(changes)[1:] if changes else None


def mixed_precision(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    calibration: Any,
    *,
    budget: float,
    choices: Sequence[Mapping[str, Any]] = FORMATS,
    dynamic: bool | None = None,
    targets: str = TARGETS,
):
    """Surgery: stores every target in the one of several formats that keeps the model's answers, within a size.

    Each target is rounded to each format alone, and its error is what that does to the model's outputs on the
    calibration text: `KL(p ‖ p̂)` a prediction in nats, of the whole model against the one with this matrix rounded
    (half the squared difference where the output is one number). Errors are added up as if they were independent, and
    `allocate` spends the bytes. A target may also stay as it is, at the size that it has.

    Args:
      model, params, axes: the model, canonical view.
      calibration: text, from `config.calibration`.
      budget: bytes of the model's parameters afterwards, as a share of what they are now.
      choices: formats, by the fields of a Scheme: `({"bits": "int4", "group": 32}, {"bits": "int8"})`.
      dynamic: products round their inputs too, a token at a time; `None`: of int8 weights.
      targets: regex over paths.

    Returns:
      `(model, params, axes)` with Quantized leaves.

    Raises:
      ValueError: for a budget that the smallest formats exceed, telling what they need.
    """
    answers = _answers(model, calibration.batches)
    whole = answers(params)
    flat = flatten(params)

    def error(path: str, rounded: jax.Array) -> float:
        changed = answers(unflatten(flat | {path: rounded}))
        return sum(_divergence(a, b) for a, b in zip(whole, changed, strict=True)) / max(sum(map(len, whole)), 1)

    return _mix("mixed_precision", model, params, axes, error, budget, choices, dynamic, targets)


def mixed_precision_weights(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    *,
    budget: float,
    choices: Sequence[Mapping[str, Any]] = FORMATS,
    dynamic: bool | None = None,
    targets: str = TARGETS,
):
    """Surgery: `mixed_precision` without data: the error of a format is `‖W - Ŵ‖² / ‖W‖²`, the noise in its product."""
    flat = flatten(params)

    def error(path: str, rounded: jax.Array) -> float:
        dense = materialize(flat[path]).astype(jnp.float32)
        return float(jnp.sum(jnp.square(dense - rounded)) / jnp.maximum(jnp.sum(jnp.square(dense)), 1e-30))

    return _mix("mixed_precision_weights", model, params, axes, error, budget, choices, dynamic, targets)


def _mix(
    who: str,
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    error: Callable[[str, jax.Array], float],
    budget: float,
    choices: Sequence[Mapping[str, Any]],
    dynamic: bool | None,
    targets: str,
):
    check_targets(params, targets, who)
    if not 0 < budget <= 1:
        raise ValueError(f"{who}: budget must be a share in (0, 1], not {budget}")
    known = {"bits": "int8", "group": None, "symmetric": True}
    pairs = []
    for choice in choices:
        if unknown := choice.keys() - known.keys():
            raise ValueError(f"{who}: a choice has no field {min(unknown)!r}; known: {', '.join(known)}")
        fields = known | dict(choice)
        pairs.append(formats(who, fields["bits"], fields["group"], fields["symmetric"], dynamic, None))
    flat = flatten(params)
    rounded = [path for path, leaf in flat.items() if chosen(path, leaf, targets)]

    def store(path: str, scheme: Scheme, inputs: Scheme | None) -> Weight:
        channel = channel_of(path)
        code = lambda w: Quantized.of(materialize(w), scheme, activations=inputs, channel=channel)  # noqa: E731
        return inside(flat[path], code)

    offers: dict[str, list[Choice]] = {}
    for path in rounded:
        offers[path] = [Choice(stored_bytes(flat[path]), 0.0)]
        for pair in pairs:
            leaf = store(path, *pair)
            offers[path].append(Choice(stored_bytes(leaf), error(path, leaf.materialize())))
    rest = sum(stored_bytes(leaf) for path, leaf in flat.items() if path not in offers)
    total = rest + sum(stored_bytes(flat[path]) for path in rounded)
    try:
        taken = allocate(offers, int(budget * total) - rest)
    except ValueError as problem:
        least = rest + sum(min(choice.bytes for choice in own) for own in offers.values())
        raise ValueError(
            f"{who}: budget {budget} of {total} bytes cannot be met, the least is {least / total:.3f} ({problem}, "
            f"what is no target {rest})"
        ) from None
    stored = {path: store(path, *pairs[index - 1]) for path, index in taken.items() if index}
    return model, unflatten(flat | stored), axes


def _answers(model: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> Callable[[Tree], list[np.ndarray]]:
    """`params -> outputs of every batch`, rows of log-probabilities (or of one number) `[predictions, classes]`.

    Of sequences, only real tokens count.
    """

    @jax.jit
    def run(params: Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
        logits = model.forward(params, batch)["logits"]
        return logits if logits.shape[-1] == 1 else jax.nn.log_softmax(logits)

    def rows(params: Tree, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        found = np.asarray(run(params, {name: a for name, a in batch.items() if not name.endswith("labels")}))
        if found.ndim == 3:
            side = "decoder_" if "decoder_input_ids" in batch else ""
            mask = batch.get(f"{side}segment_ids", batch.get(f"{side}attention_mask", np.ones(found.shape[:2])))
            return found[np.asarray(mask) > 0]
        return found

    return lambda params: [rows(params, batch) for batch in batches]


def _divergence(whole: np.ndarray, rounded: np.ndarray) -> float:
    """`Σ KL(p ‖ p̂)` over rows of log-probabilities, or half the squared difference of single numbers."""
    if whole.shape[-1] == 1:
        return float(0.5 * np.square(whole - rounded).sum())
    return float(np.sum(np.exp(whole) * np.where(np.isfinite(whole), whole - rounded, 0)))
