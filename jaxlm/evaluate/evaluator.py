"""Quality of a model on one split: its predictions batch by batch, a few numbers an example, and metrics of their sums.

Training, the results of a stage and reports all evaluate here; see `jaxlm.tasks.EvalSpec` for what a task says of it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.core import MODEL_INPUTS, Context, Tree
from jaxlm.data.loader import Batches
from jaxlm.data.settings import DataSettings
from jaxlm.models.network import Network
from jaxlm.parallel.batches import gather_to_host
from jaxlm.tasks import BatchPredictions, EvalSpec, Prepared, Task
from jaxlm.tasks.encode import batches_of
from jaxlm.tasks.metrics import Columns
from jaxlm.tasks.task import Read


@dataclass(frozen=True)
class Score:
    """How good a model is on a split.

    Attributes:
      metrics: by the keys of `result.json`.
      table: makes the text of `report`.
    """

    metrics: dict[str, float]
    table: Callable[[], str]

    @property
    def report(self) -> str:
        """The metrics in detail, for people; made when asked for, "" for tasks without."""
        return self.table()


@functools.partial(jax.jit, static_argnames=("model", "read", "without", "dtype"))
def read_batch(
    params: Tree,
    batch: Mapping[str, jax.Array],
    *,
    model: Network,
    read: Read,
    without: tuple[str, ...],
    ctx: Context,
    dtype: Any,
) -> dict[str, jax.Array]:
    """What `read` gives of one batch; compiled once for all splits and models of a process with the same structure.

    Args:
      without: names that are not needed, and not computed.
      ctx: placement of activations.
      dtype: of activations and products.
    """
    outputs = model.forward(params, batch, ctx=ctx, dtype=dtype)
    return {name: values for name, values in read(outputs, batch).items() if name not in without}


def predict(
    batches: Batches, read: Callable[[dict[str, np.ndarray]], Mapping[str, jax.Array]], labels: tuple[str, ...]
) -> Iterator[BatchPredictions]:
    """A model's predictions of every batch of an epoch, in order and on the host.

    Args:
      read: `batch -> arrays on the devices`, which need not be ready. While the predictions of a batch are used, the
        devices read the next one.
      labels: names of the model's classes.
    """

    def start(number: int) -> tuple[dict[str, np.ndarray], Mapping[str, jax.Array]]:
        batch = batches(number)
        rest = {name: array for name, array in batch.items() if name not in MODEL_INPUTS}
        return rest, read({name: array for name, array in batch.items() if name != "row"})

    following = start(0)
    for number in range(batches.steps_per_epoch):
        batch, arrays = following
        if number + 1 < batches.steps_per_epoch:
            following = start(number + 1)
        on_host = {name: np.asarray(gather_to_host(values)) for name, values in arrays.items()}
        yield BatchPredictions(read=on_host, teacher=None, batch=batch, labels=labels)


def example_columns(spec: EvalSpec, predictions: Iterable[BatchPredictions]) -> dict[str, np.ndarray]:
    """The columns of all examples of at least one batch, `[examples]` each."""
    parts = [spec.examples(batch) for batch in predictions]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def result_metrics(spec: EvalSpec, columns: Columns, classes: int, facts: Mapping[str, int]) -> dict[str, float]:
    """The metrics of `result.json`, NaN where there is nothing to measure.

    Args:
      classes: number of classes, of a classification.
      facts: of `Prepared`.
    """
    metrics = {key: metric.over(columns, classes) for key, metric in spec.metrics.items() if metric.applies(columns)}
    return metrics | {key: float(facts[name]) for key, name in spec.facts.items() if name in facts}


def evaluator(
    task: Task,
    model: Network,
    prepared: Prepared,
    tokenizer: Any,
    settings: DataSettings,
    *,
    batch_size: int,
    to_devices: Callable,
    ctx: Context,
    dtype: Any,
) -> Callable[[Tree], Score]:
    """`params -> Score` over every example of a split, once, without dropout.

    Args:
      to_devices: `batch -> (tokens, batch on the devices)`.
      ctx: placement of activations.
      dtype: of activations and products.
    """
    spec, labels = task.evaluation, model.config.labels
    batches = batches_of(model.config, task, prepared, tokenizer, settings, batch_size, None)
    options = {"model": model, "read": spec.read, "without": spec.agreement_only, "ctx": ctx, "dtype": dtype}

    def evaluate(params: Tree) -> Score:
        predictions = predict(batches, lambda batch: read_batch(params, to_devices(batch)[1], **options), labels)
        table: Callable[[], str] = str
        if spec.table is not None:
            kept = list(predictions)
            predictions, table = iter(kept), functools.partial(spec.table, kept, prepared.facts)
        columns = example_columns(spec, predictions)
        return Score(result_metrics(spec, columns, len(labels), prepared.facts), table)

    return evaluate
