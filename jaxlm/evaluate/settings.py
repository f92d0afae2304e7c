"""`config.report` and `config.search`: every field is a field here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReportSettings:
    """How the models of a pipeline are compared.

    Attributes:
      title: heading of the report; corpus: what the held-out data are, in words.
      split: `eval` or `test`: what quality is measured on.
      tolerance: recommended is what is at most this fraction worse than the reference.
      prompt: what generating models continue, "" for no sample.
      batch_size: rows of a timed batch.
      rounds, seconds: timing rounds, and the time they may take.
    """

    title: str = ""
    corpus: str = ""
    split: str = "eval"
    tolerance: float = 0.05
    prompt: str = ""
    batch_size: int = 16
    rounds: int = 15
    seconds: float = 20.0

    def __post_init__(self):
        if self.split not in ("eval", "test"):
            raise ValueError(f"config.report.split = {self.split!r}: eval or test")
        if self.batch_size < 1 or self.rounds < 3:
            raise ValueError(
                f"config.report: batch_size {self.batch_size} must be at least 1 and rounds {self.rounds} at least 3"
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"config.report.tolerance = {self.tolerance}: a fraction in [0, 1)")


COSTS = {"size": "minimize", "flops": "minimize", "speed": "maximize", "latency": "maximize"}
"""What quality may be weighed against: bytes on disk, FLOPs per token, times as fast as the reference."""


@dataclass(frozen=True)
class SearchSettings:
    """What `jaxlm search` varies, and what for.

    Attributes:
      vary: the strengths, `{"stage": name, "field": place, "low": a, "high": b}` each, with `"log": True` for a
        logarithmic range, or with `"values": (…)` in the place of `low` and `high`. A place is a path in the stage
        (`surgery.0.ffn`, `methods.0.rank`, `train.steps`), or several that get the same value. Whole bounds mean
        whole numbers.
      stage: the stage whose model counts, "" for the last; its `reference` is what it is compared with.
      cost: `size`, `flops`, `speed` or `latency`.
      trials: how many to try. A single strength is swept evenly, a finite set of all combinations tried whole where
        it fits; otherwise a sampler looks for the front.
    """

    vary: Any = ()
    stage: str = ""
    cost: str = "size"
    trials: int = 12

    def __post_init__(self):
        if self.cost not in COSTS:
            raise ValueError(f"config.search.cost = {self.cost!r}; known: {', '.join(COSTS)}")
        if self.trials < 1:
            raise ValueError(f"config.search.trials = {self.trials}: at least 1")
        strengths: Sequence[Mapping[str, Any]] = self.vary
        for strength in strengths:
            known = {"stage", "field", "values"} if "values" in strength else {"stage", "field", "low", "high", "log"}
            if wrong := (strength.keys() - known) | (known - {"log"} - strength.keys()):
                raise ValueError(
                    f"config.search.vary: an entry has stage, field, and either values or low and high; "
                    f"{', '.join(sorted(wrong))} in {dict(strength)}"
                )
            if "values" in strength and not strength["values"]:
                raise ValueError(f"config.search.vary: no values in {dict(strength)}")
            if "low" in strength and not strength["low"] < strength["high"]:
                raise ValueError(f"config.search.vary: low must be below high in {dict(strength)}")
