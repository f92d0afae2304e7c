"""The surgery socket: functions from a model to a model, before any training."""

from typing import Any, NamedTuple

from jaxlm.core.paths import Tree
from jaxlm.core.weight import Axes


class Operated(NamedTuple):
    """What a surgery `(model, params, axes, **options) -> Operated` returns; canonical view on both sides.

    A plain triple does where the tokenizer stays what it is, as nearly always. A surgery whose signature names one of
    these is given it: `calibration` (data that the model may see), `calibrate` (the function that reads them, for a
    surgery that does not always want them), `loss` (the task's, `(outputs, batch) -> terms`), `tokenizer`, `texts`
    (`split -> texts` of the run's data).
    """

    model: Any
    params: Tree
    axes: dict[str, Axes]
    tokenizer: Any = None
