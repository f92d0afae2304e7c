"""`config.report`: every field is a field here."""

from dataclasses import dataclass


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
