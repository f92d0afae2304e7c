"""The surgery socket: functions from a model to a model, before any training, and what they may read besides it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxlm.core.loss import TaskLoss
from jaxlm.core.model import LM


@dataclass(frozen=True)
class Calibration:
    """Text that a model reads while it is compressed; never the text that it is evaluated on.

    Attributes:
      batches: numpy batches as the task makes them, labels included.
      source: the place that they were read from.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    source: str = ""

    def facts(self) -> dict[str, Any]:
        """What a report says of it: the source, its rows and their tokens."""
        masks = [batch[name] for batch in self.batches for name in ("attention_mask", "segment_ids") if name in batch]
        rows = sum(int(np.count_nonzero(mask.reshape(len(mask), -1).any(axis=1))) for mask in masks)
        return {"source": self.source, "samples": rows, "tokens": sum(int(np.count_nonzero(mask)) for mask in masks)}


class NoData(ValueError):
    """A surgery asked its context for data, and the context has none."""


@dataclass(frozen=True)
class SurgeryContext:
    """What a surgery may read besides the model; nothing is read before it is asked for.

    Attributes:
      read_calibration: `model -> Calibration` in the tokens and labels of that model.
      task_loss: the loss of the run's task.
      read_texts: `split -> texts` of the run's data.
    """

    read_calibration: Callable[[LM], Calibration] | None = None
    task_loss: TaskLoss | None = None
    read_texts: Callable[[str], Iterable[str]] | None = None

    def calibration(self, lm: LM) -> Calibration:
        """The calibration data as `lm` reads them.

        Raises:
          NoData: where the context has none.
        """
        if self.read_calibration is None:
            raise NoData("it reads calibration data: set config.calibration, or give SurgeryContext a read_calibration")
        return self.read_calibration(lm)

    def loss(self) -> TaskLoss:
        """The task's loss.

        Raises:
          NoData: where the context has none.
        """
        if self.task_loss is None:
            raise NoData("it reads the loss of a task: give SurgeryContext a task_loss, (outputs, batch) -> terms")
        return self.task_loss

    def texts(self, split: str) -> Iterable[str]:
        """The texts of a split of the run's data, read anew on every pass.

        Raises:
          NoData: where the context has none.
        """
        if self.read_texts is None:
            raise NoData(f"it reads the texts of config.data.{split}: give SurgeryContext a read_texts")
        return self.read_texts(split)


NO_DATA = SurgeryContext()
"""The context of a surgery that needs the model alone."""


class Surgery(Protocol):
    """`(model, context, **options) -> model`, canonical view on both sides; options are those of a config's entry."""

    def __call__(self, lm: LM, context: SurgeryContext = ..., /, **options: Any) -> LM: ...
