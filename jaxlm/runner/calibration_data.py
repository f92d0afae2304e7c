"""`config.calibration`: the text that compression reads, and the promise that no model is evaluated on it."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxlm.core import Calibration
from jaxlm.data.packing import counted
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.models.config import ModelConfig
from jaxlm.tasks import Task
from jaxlm.tasks.encode import batches_of, prepare

MASKS = ("attention_mask", "segment_ids", "decoder_attention_mask", "decoder_segment_ids")


def read_calibration(
    settings: CalibrationSettings,
    name: str,
    task: Task,
    tokenizer: Any,
    model: ModelConfig,
    data: DataSettings,
    seed: int,
) -> Calibration:
    """The calibration text as the batches of a task.

    Args:
      name: of the task; model: whose labels and positions the rows must fit; data: `config.data`; seed: of the draw.

    Raises:
      ValueError: for text that the model is evaluated on, or rows longer than its positions.
    """
    place = calibration_location(settings.source, data)
    length = settings.length or data.max_length
    if model.max_positions and length > model.max_positions:
        raise ValueError(
            f"config.calibration.length = {length}, but the model has {model.max_positions} positions; choose fewer"
        )
    one_shape = dataclasses.replace(
        data, train=place, unlabelled="", max_length=length, buckets=1
    )  # one shape to compile
    prepared = prepare(name, task, tokenizer, model.labels, one_shape, "train")
    batches = batches_of(model, task, prepared, tokenizer, one_shape, min(settings.batch_size, settings.samples), seed)
    kept: list[dict[str, np.ndarray]] = []
    missing = settings.samples
    for step in range(batches.steps_per_epoch):
        batch = dict(batches(step))
        rows = np.flatnonzero(~fillers(batch))[:missing]
        if len(rows):
            kept.append(only(batch, rows))
            missing -= len(rows)
        if not missing:
            break
    return Calibration(tuple(kept), place)


def calibration_location(source: str, data: DataSettings) -> str:
    """The place behind `config.calibration.source`, which shares no row with the evaluation data.

    Raises:
      ValueError: where it does, or where that cannot be excluded.
    """
    if source in ("eval", "test"):
        raise ValueError(
            f"config.calibration.source = {source!r}: what a model is made from must not be what it is measured "
            f"on; use 'train', or another place"
        )
    place = data.train if source == "train" else source
    if not place:
        raise ValueError("config.calibration.source = 'train', but config.data.train is empty; name a place")
    data.refuse_evaluated(place, "config.calibration.source")
    return place


def fillers(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Rows that only fill a batch: a token of padding a text that attends to itself, and nothing to predict."""
    rows, *group, _ = batch["input_ids"].shape
    tokens = sum(np.count_nonzero(batch[name].reshape(rows, -1), axis=1) for name in MASKS[:2] if name in batch)
    labels = counted(batch["labels"]).reshape(len(batch["labels"]), -1)
    return (tokens <= math.prod(group)) & ~labels.any(axis=1)


def only(batch: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The batch with every other row turned into padding: the shape stays, so that nothing compiles anew."""
    kept = np.zeros(len(batch["input_ids"]), bool)
    kept[rows] = True

    def keep(name: str, array: np.ndarray) -> np.ndarray:
        fill = 0 if name in MASKS else np.nan if np.issubdtype(array.dtype, np.floating) else -100
        if name in MASKS or name.endswith("labels"):
            return np.where(kept.reshape(-1, *(1,) * (array.ndim - 1)), array, np.asarray(fill, array.dtype))
        return array

    return {name: keep(name, array) for name, array in batch.items()}
