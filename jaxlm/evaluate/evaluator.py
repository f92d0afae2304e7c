"""Evaluation of a model on one split."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlm.core import Context, Term, Tree
from jaxlm.data.settings import DataSettings
from jaxlm.models.network import Network
from jaxlm.parallel.batches import gather_to_host
from jaxlm.tasks import Prepared, Score, Task
from jaxlm.tasks.encode import batches_of
from jaxlm.tasks.task import stacked


@functools.partial(jax.jit, static_argnames=("model", "measure", "predict", "ctx", "dtype"))
def _read(params: Tree, batch: dict[str, jax.Array], *, model: Network, measure, predict, ctx: Context, dtype: Any):
    """One batch; compiled once for all splits and stages of a process that evaluate the same structure."""
    outputs = model.forward(params, batch, ctx=ctx, dtype=dtype)
    return measure(outputs, batch), predict(outputs, batch)


def evaluator(
    task: Task,
    model: Network,
    prepared: Prepared,
    tokenizer: Any,
    settings: DataSettings,
    *,
    batch_size: int,
    place: Callable,
    ctx: Context,
    dtype: Any,
) -> Callable[[Tree], Score]:
    """`params -> Score` over every example of a split, once, without dropout.

    Args:
      place: `batch -> (tokens, batch on the devices)`.
      ctx: placement of activations.
      dtype: of activations and products.
    """
    batches = batches_of(model.config, task, prepared, tokenizer, settings, batch_size, None)

    read = functools.partial(_read, model=model, measure=task.measure, predict=task.predict, ctx=ctx, dtype=dtype)

    def evaluate(params: Tree) -> Score:
        terms: list[dict[str, Term]] = []
        predictions: dict[str, list[np.ndarray]] = {}
        for number in range(batches.steps_per_epoch):
            host_batch = batches(number)
            rows = host_batch.pop("row", None)
            measured, predicted = read(params, place(host_batch)[1])
            terms.append(measured)
            real = slice(None) if rows is None else rows >= 0
            for name, value in predicted.items():
                predictions.setdefault(name, []).append(np.asarray(gather_to_host(value))[real])
        arrays = {name: stacked(parts) for name, parts in predictions.items()}
        return task.score(_sums(jax.device_get(terms)), arrays, model.config.labels, prepared.facts)

    return evaluate


def _sums(terms: list[dict[str, Term]]) -> dict[str, Term]:
    """Sums over batches in float64: float32 cannot count beyond 2²⁴ tokens."""

    def add(name: str, field: str) -> Any:
        return np.sum([getattr(part[name], field) for part in terms], dtype=np.float64)

    return {name: Term(add(name, "sum"), add(name, "weight"), term.coefficient) for name, term in terms[0].items()}
