"""Tasks by the name that `config.task` uses."""

from jaxlm.tasks.classification import regression, sequence, token
from jaxlm.tasks.language_modeling import causal
from jaxlm.tasks.masked import masked, next_sentence
from jaxlm.tasks.metrics import Metric
from jaxlm.tasks.seq2seq import denoising, seq2seq
from jaxlm.tasks.task import BatchPredictions, EvalSpec, Prepared, Task

TASKS: dict[str, Task] = {
    "causal": causal,
    "masked": masked,
    "next_sentence": next_sentence,
    "denoising": denoising,
    "seq2seq": seq2seq,
    "sequence": sequence,
    "regression": regression,
    "token": token,
}

__all__ = ["TASKS", "BatchPredictions", "EvalSpec", "Metric", "Prepared", "Task"]
