"""`config.train`: every field is a field here."""

from dataclasses import dataclass
from typing import Any

NOT_NEGATIVE = (
    *("steps", "epochs", "learning_rate", "warmup", "final_learning_rate", "weight_decay", "eps", "clip"),
    *("eval_every", "checkpoint_every", "patience", "profile_from", "profile_steps"),
)


@dataclass(frozen=True)
class TrainSettings:
    """How long, how fast and how carefully a model is trained.

    Attributes:
      steps: updates; 0 trains nothing, and then `epochs` passes over the training data decide if that is not 0.
      epochs: passes over the training data, when `steps` is 0.
      batch_size: rows of a step, all hosts and microbatches together.
      learning_rate: peak; schedule: `linear`, `cosine`, `constant` or `inverse_sqrt` after `warmup`; warmup: steps,
        or a share of all steps when below 1; final_learning_rate: share of the peak at the end of linear and cosine.
      optimizer: `adamw`, `adafactor`, `lion`, `sgd`; b1, b2, eps: constants of the optimizer.
      weight_decay: decoupled decay; decay: rules `(path regex, bool)` before the default (kernels and embeddings).
      learning_rates: rules `(path regex, factor)` on the learning rate; trainable: rules `(path regex, bool)`.
      clip: largest global norm of the gradient, 0 for none.
      grad_accum: microbatches of a step.
      dtype: of activations and products; parameters, optimizer and reductions are float32.
      remat: what layers keep for the backward pass: `none`, `dots`, `full`.
      log_every, eval_every, checkpoint_every: steps between; 0: only at the end.
      keep: training checkpoints kept; average_last: the parameters of this many checkpoints, the last of those at
        multiples of `checkpoint_every` and the end, are averaged into the final model.
      select: metric of the evaluation that decides which parameters are kept, "" for the last ones; patience:
        evaluations without improvement before stopping, 0 for never.
      max_nonfinite: consecutive skipped updates that end the run.
      profile_from, profile_steps: trace these steps into `workdir/profile`; 0 steps: none.
    """

    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.0
    final_learning_rate: float = 0.0
    optimizer: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: tuple = ()
    learning_rates: tuple = ()
    trainable: tuple = ()
    clip: float = 1.0
    grad_accum: int = 1
    dtype: str = "float32"
    remat: str = "dots"
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    average_last: int = 1
    select: str = ""
    patience: int = 0
    max_nonfinite: int = 20
    profile_from: int = 10
    profile_steps: int = 0

    def __post_init__(self):
        def refuse(name: str, why: str) -> None:
            raise ValueError(f"config.train.{name} = {getattr(self, name)!r}: {why}")

        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                refuse(name, "must not be negative")
        for name in ("batch_size", "grad_accum", "log_every", "keep", "average_last", "max_nonfinite"):
            if getattr(self, name) < 1:
                refuse(name, "must be at least 1")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                refuse(name, "must be in [0, 1)")
        if self.batch_size % self.grad_accum:
            refuse("grad_accum", f"does not divide batch_size {self.batch_size}")
        for name, choices in (("dtype", ("float32", "bfloat16")), ("remat", ("none", "dots", "full"))):
            if getattr(self, name) not in choices:
                refuse(name, f"known: {', '.join(choices)}")
        if self.average_last > 1 and self.select:
            refuse("average_last", f"config.train.select = {self.select!r} already decides what is kept; drop one")
        if self.patience and not self.select:
            refuse("patience", "early stopping needs config.train.select, the metric to watch")
        if self.patience and not self.eval_every:
            refuse("patience", "early stopping needs config.train.eval_every, the steps between two evaluations")

    def warmup_steps(self, steps: int) -> int:
        """Warm-up in steps."""
        return int(self.warmup * steps + 1e-6) if self.warmup < 1 else int(self.warmup)

    def rules(self, name: str) -> list[tuple[str, Any]]:
        """One of the rule fields as a list of pairs."""
        return [(pattern, value) for pattern, value in getattr(self, name)]
