"""`config.calibration`: the text that compression reads, and the promise that no model is evaluated on it."""

import dataclasses
import glob
import os
from typing import Any

import numpy as np

from jaxlm.build.data import prepare
from jaxlm.compress.calibrate import Calibration
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.data.sources.places import Slice, split_place
from jaxlm.models.config import ModelConfig
from jaxlm.tasks import Task

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
    place = calibration_place(settings.source, data)
    length = settings.length or data.max_length
    if model.max_positions and length > model.max_positions:
        raise ValueError(
            f"config.calibration.length = {length}, but the model has {model.max_positions} positions; choose fewer"
        )
    own = dataclasses.replace(data, train=place, max_length=length, buckets=1)  # one shape to compile
    prepared = prepare(name, task, tokenizer, model.labels, own, "train")
    batches = task.batches(prepared, tokenizer, own, min(settings.batch_size, settings.samples), seed)
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


def calibration_place(source: str, data: DataSettings) -> str:
    """The place behind `config.calibration.source`, which shares no row with the evaluation data.

    Raises:
      ValueError: where it does, or where that cannot be excluded.
    """
    if source in ("eval", "test"):
        raise ValueError(
            f"config.calibration.source = {source!r}: what a model is compressed on must not be what it is measured "
            f"on; use 'train', or another place"
        )
    place = data.train if source == "train" else source
    if not place:
        raise ValueError("config.calibration.source = 'train', but config.data.train is empty; name a place")
    for split in ("eval", "test"):
        other = getattr(data, split)
        if other and may_share(place, other):
            raise ValueError(
                f"config.calibration.source reads {place!r}, which may share rows with config.data.{split} = "
                f"{other!r}: what a model is compressed on must not be what it is measured on; take a slice that ends "
                f"where the other begins (both in rows or both in percent), or another place"
            )
    return place


def may_share(a: str, b: str) -> bool:
    """Whether two places may have a row in common.

    >>> may_share("corpus[:40%]", "corpus[98%:]"), may_share("corpus[:40%]", "corpus[30%:]")
    (False, True)
    """
    (bare_a, part_a), (bare_b, part_b) = split_place(a), split_place(b)
    files_a, files_b = _files(bare_a), _files(bare_b)
    if files_a.isdisjoint(files_b):
        return False
    return files_a != files_b or not (_ends_before(part_a, part_b) or _ends_before(part_b, part_a))


def _files(bare: str) -> frozenset[str]:
    """What a place names: its files, whatever they are called, or the name itself (`dataset:version:split`)."""
    path = os.path.expanduser(bare)
    found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    dataset, _, split = bare.rpartition(":")
    return frozenset(map(os.path.realpath, found)) or frozenset({f"{dataset.partition(':')[0]}:{split}"})


def _ends_before(first: Slice, second: Slice) -> bool:
    """Whether one slice ends before another begins, however many rows there are."""
    (share, rows), (other_share, other_rows) = _bound(first.stop, (1.0, 0)), _bound(second.start, (0.0, 0))
    return share <= other_share and rows <= other_rows


def _bound(bound: str | None, default: tuple[float, int]) -> tuple[float, int]:
    """A bound as `share · n + rows`."""
    if bound is None:
        return default
    value = int(bound.rstrip("%"))
    if bound.endswith("%"):
        return (value if not bound.startswith("-") else 100 + value) / 100, 0
    return (1.0, value) if bound.startswith("-") else (0.0, value)


def fillers(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Rows that only fill a batch: one token of padding that attends to itself, and nothing to predict."""
    tokens = sum(np.count_nonzero(batch[name], axis=1) for name in MASKS[:2] if name in batch)
    labels = batch["labels"].reshape(len(batch["labels"]), -1)
    nothing = np.isnan(labels) if np.issubdtype(labels.dtype, np.floating) else labels == -100
    return (tokens <= 1) & nothing.all(axis=1)


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
