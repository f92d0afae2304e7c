"""Measures several models beside each other: quality on the same data, size, and speed in turn, in one process."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import MODEL_INPUTS, Context, Tree
from jaxlm.data.loader import Batches
from jaxlm.data.settings import DataSettings
from jaxlm.evaluate.comparison import ModelResult
from jaxlm.evaluate.cost import (
    bytes_by_dtype,
    bytes_on_disk,
    flops_per_token,
    flops_per_token_of_pairs,
    parameters,
)
from jaxlm.evaluate.evaluator import example_columns, predict, read_batch
from jaxlm.evaluate.layer_stats import layer_statistics
from jaxlm.evaluate.per_example import PerExampleResults
from jaxlm.evaluate.settings import ReportSettings
from jaxlm.evaluate.timing import Timing, interleaved, machine, versions
from jaxlm.generate.decoding import generate
from jaxlm.io.lm import LM
from jaxlm.io.pretrained import load
from jaxlm.models.heads import HEADS
from jaxlm.models.network import Network
from jaxlm.parallel.batches import token_count
from jaxlm.tasks import TASKS, Prepared, Task
from jaxlm.tasks.encode import batches_of, check_fit, prepare

PACKING = ("segment_ids", "positions")
"""Inputs that a timed forward pass goes without: packed rows are timed as full rows of one text."""
NEW_TOKENS = 48
"""Tokens of a sample."""


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
      name, description: for the report.
      directory: its model directory.
      reference: name of the candidate it is measured against, `None` for the reference itself.
      beside: further candidates worth a sentence.
      train_tokens: tokens it was trained on.
      facts: what else the report says of it, by name.
    """

    name: str
    description: str
    directory: Path
    reference: str | None = None
    beside: tuple[str, ...] = ()
    train_tokens: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What models are asked to do.

    Attributes:
      name: of the task; data: held out, the split that `settings` names.
      settings: of the report.
    """

    name: str
    data: DataSettings
    settings: ReportSettings

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    def prepared(self, lm: LM) -> Prepared:
        """The held-out data in the tokens and classes of a model."""
        return prepare(self.name, self.task, lm.tokenizer, lm.config.labels, self.data, self.settings.split)

    def batches(self, lm: LM) -> Batches:
        """The same in order, each row once."""
        return batches_of(
            lm.config, self.task, self.prepared(lm), lm.tokenizer, self.data, self.settings.batch_size, None
        )


class RunnableModel(NamedTuple):
    """A model that is ready to run: its directory, its parameters in the run view, and its batches."""

    lm: LM
    params: Tree
    batches: Batches


def compare_models(candidates: Sequence[Candidate], trial: Trial, info: Callable[[str], None]) -> list[ModelResult]:
    """One ModelResult a candidate. Agreement is measured with the first of them."""
    models: dict[str, RunnableModel] = {}
    for candidate in candidates:
        lm = load(candidate.directory)
        check_comparable(candidate, lm, trial, next(iter(models.values()), None))
        models[candidate.name] = RunnableModel(lm, lm.network.run_view(lm.params), trial.batches(lm))
    info("measuring quality")
    held_out: dict[str, PerExampleResults] = {}
    teacher: Answers | None = None
    for name, runnable in models.items():
        held_out[name], answers = evaluate_held_out(runnable, trial, teacher)
        teacher = teacher or answers
    info("measuring speed, all models in turn")
    speeds = time_models(models, trial)
    results = []
    for candidate in candidates:
        runnable, speed = models[candidate.name], speeds[candidate.name]
        lm = runnable.lm
        sample, tokens_per_second = write_sample(runnable, trial)
        counts = parameters(lm.params)
        results.append(
            ModelResult(
                name=candidate.name,
                description=candidate.description,
                parameters=counts.total,
                parameters_non_embedding=counts.non_embedding,
                bytes_on_disk=bytes_on_disk(candidate.directory),
                bytes_by_dtype=bytes_by_dtype(candidate.directory),
                reference=candidate.reference,
                beside=candidate.beside,
                flops_per_token=flops(lm, speed.lengths),
                batch=speed.batch,
                batch_tokens=speed.tokens,
                single=speed.single,
                compile_seconds=speed.compile_seconds,
                peak_bytes=speed.peak_bytes,
                held_out=held_out[candidate.name],
                layers=layer_statistics(lm.config, lm.params, candidate.directory),
                train_tokens=candidate.train_tokens,
                facts=candidate.facts,
                prompt=trial.settings.prompt if sample is not None else "",
                sample=sample,
                sample_tokens_per_second=tokens_per_second,
            )
        )
    return results


def check_comparable(candidate: Candidate, lm: LM, trial: Trial, first: RunnableModel | None) -> None:
    """Raises ValueError for a model that does not do the task, or has other classes than the first."""
    if lm.config.head != trial.task.structure["head"]:
        raise ValueError(
            f"{candidate.directory} has the head {lm.config.head!r}, the task {trial.name} needs "
            f"{trial.task.structure['head']!r}; leave the stage out of the report with compare=False"
        )
    if lm.tokenizer is None:
        raise ValueError(f"{candidate.directory} has no tokenizer; a model without one reads no text")
    check_fit(lm.config, lm.tokenizer, trial.data)
    if first is not None and lm.config.labels != first.lm.config.labels:
        raise ValueError(
            f"{candidate.name} has the classes {lm.config.labels}, the first model has {first.lm.config.labels}; "
            "train all of them on the same labels"
        )


# Quality --------------------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a model predicted, batch by batch; the labels it was asked for, and which examples they are of."""

    read: list[Mapping[str, np.ndarray]]
    labels: list[np.ndarray]
    rows: list[np.ndarray | None]

    def beside(self, other: "Answers") -> list[Mapping[str, np.ndarray]] | None:
        """These answers in the order of another model's batches, `None` where they answer other questions.

        Another tokenizer sorts examples in another way, and cuts text in other places: answers about whole examples can
        still be compared, those about tokens cannot.
        """
        pairs: list[tuple[Any, Any]] = [*zip(self.labels, other.labels, strict=False)]
        pairs += zip(self.rows, other.rows, strict=False)
        if len(self.labels) == len(other.labels) and all(np.array_equal(a, b) for a, b in pairs):
            return self.read
        rows = [numbers for numbers in self.rows if numbers is not None]
        others = [numbers for numbers in other.rows if numbers is not None]
        if not rows or not others or self.read[0]["predicted"].ndim > 1:
            return None
        numbers = np.concatenate(rows)
        order = np.argsort(numbers, kind="stable")[(numbers < 0).sum() :]
        by_row = {name: np.concatenate([batch[name] for batch in self.read])[order] for name in self.read[0]}
        return [{name: values[batch] for name, values in by_row.items()} for batch in others]


def evaluate_held_out(
    runnable: RunnableModel, trial: Trial, teacher: Answers | None
) -> tuple[PerExampleResults, Answers]:
    """What a report stores of a model's predictions on the held-out data, and the predictions themselves.

    Args:
      teacher: the predictions to agree with, if any.
    """
    spec, labels = trial.task.evaluation, runnable.lm.config.labels
    read = functools.partial(
        read_batch, model=runnable.lm.network, read=spec.read, without=(), ctx=Context(), dtype=jnp.float32
    )
    predictions = list(predict(runnable.batches, lambda batch: read(runnable.params, batch), labels))
    rows = [prediction.batch.get("row") for prediction in predictions]
    answers = Answers([prediction.read for prediction in predictions], [p.batch["labels"] for p in predictions], rows)
    of_teacher = None if teacher is None else teacher.beside(answers)
    if of_teacher is not None:
        predictions = [p._replace(teacher=answer) for p, answer in zip(predictions, of_teacher, strict=True)]
    columns = example_columns(spec, predictions)
    numbers = np.concatenate([batch[batch >= 0] for batch in rows if batch is not None] or [np.empty(0, np.int64)])
    if len(numbers) == len(columns[spec.same]):  # as in the file, whatever lengths a tokenizer gives them
        columns = {name: column[np.argsort(numbers)] for name, column in columns.items()}
    stored = {name: tuple(column.tolist()) for name, column in spec.reported(columns).items()}
    return PerExampleResults(trial.name, stored, len(labels)), answers


# Speed ---------------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Seconds over a batch and over one row, tokens and lengths of the batch, and what its compiled pass takes."""

    batch: Timing
    single: Timing
    tokens: int
    lengths: tuple[int, ...]
    compile_seconds: float
    peak_bytes: int


def typical_batch(batches: Batches, rows: int) -> dict[str, np.ndarray]:
    """Rows of the median length (they come sorted by it), or full rows of running text."""
    batch = batches(batches.steps_per_epoch // 2 if batches.kinds > 1 else 0)
    numbers = batch.get("row")
    real = slice(None) if numbers is None or not (numbers >= 0).any() else numbers >= 0
    inputs = {name: batch[name][real] for name in MODEL_INPUTS if name in batch and name not in PACKING}
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}


def time_models(models: Mapping[str, RunnableModel], trial: Trial) -> dict[str, Speed]:
    """A forward pass over a batch of typical rows and over one of them, all models in turn."""
    settings, many, one, facts = trial.settings, {}, {}, {}
    for name, runnable in models.items():
        batch = typical_batch(runnable.batches, settings.batch_size)
        forward = _forward(runnable.lm.network)
        started = time.perf_counter()
        compiled = jax.jit(forward).lower(runnable.params, batch).compile()
        facts[name] = (_tokens(batch), _lengths(batch), time.perf_counter() - started, _peak(compiled))
        single = {column: array[:1] for column, array in batch.items()}
        many[name] = _thunk(compiled, runnable.params, batch)
        one[name] = _thunk(jax.jit(forward).lower(runnable.params, single).compile(), runnable.params, single)
    batches, singles = (interleaved(thunks, settings.rounds, settings.seconds) for thunks in (many, one))
    return {name: Speed(batches[name], singles[name], *facts[name]) for name in models}


def _forward(network: Network) -> Callable[[Tree, dict], jax.Array]:
    return lambda params, batch: network.forward(params, batch, ctx=Context())["logits"]


def _thunk(compiled: Any, params: Tree, batch: Mapping[str, np.ndarray]) -> Callable[[], jax.Array]:
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    return lambda: compiled(params, placed)


def _tokens(batch: Mapping[str, np.ndarray]) -> int:
    return token_count(batch) or batch["input_ids"].size


def _lengths(batch: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    return tuple(batch[name].shape[-1] for name in ("input_ids", "decoder_input_ids") if name in batch)


def _peak(compiled: Any) -> int:
    """Bytes of arguments, temporaries and results; what is aliased counts once."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return int(total - memory.alias_size_in_bytes)


def flops(lm: LM, lengths: tuple[int, ...]) -> int:
    """Floating-point operations a token of a forward pass over rows of these lengths."""
    config, params = lm.config, lm.network.unshared(lm.params)  # a shared layer computes as often as it is used
    head_dim = config.layers()[0].head_dim
    head = HEADS[config.head]
    tied = config.tie_embeddings and head.vocabulary
    if config.encoder_decoder:
        heads = (config.num_heads, config.decoder_num_heads, config.cross_num_heads)
        return flops_per_token_of_pairs(
            params, lengths=(lengths[0], lengths[1]), heads=heads, head_dim=head_dim, tied_head=tied
        )
    return flops_per_token(
        params,
        context=lengths[0],
        heads=config.num_heads,
        head_dim=head_dim,
        causal=config.causal,
        tied_head=tied,
        once="" if head.per_token else r"head/.*",
    )


def write_sample(runnable: RunnableModel, trial: Trial) -> tuple[str | None, float | None]:
    """What a generating model writes for the prompt (temperature 0.8, top-p 0.9, one seed for all), and its tokens/s.

    A model with few positions gets at most half of them as prompt, and stops at the last one; what follows an end token
    is not shown.
    """
    lm, tokenizer, text = runnable.lm, runnable.lm.tokenizer, trial.settings.prompt
    if not text or not HEADS[lm.config.head].generates:
        return None, None
    prompt = prompt_ids(tokenizer, text, lm.config.encoder_decoder)
    room = lm.config.max_positions or 2 * (len(prompt) + NEW_TOKENS)
    ids = jnp.asarray(prompt[: room // 2], jnp.int32)[None]
    if not ids.size:
        return None, None
    new_tokens = min(NEW_TOKENS, room - ids.shape[1])
    options: dict[str, Any] = {"new_tokens": new_tokens, "temperature": 0.8, "top_p": 0.9, "stop": lm.end_ids}

    def write() -> np.ndarray:
        return np.asarray(generate(lm.config, runnable.params, {"input_ids": ids}, jax.random.key(0), **options))

    tokens = write()[0]
    started = time.perf_counter()
    write()
    seconds = time.perf_counter() - started
    written = np.cumsum(np.isin(tokens, lm.end_ids)) == 0
    return tokenizer.decode(tokens[written], skip_special_tokens=True), new_tokens / seconds


def prompt_ids(tokenizer: Any, text: str, whole: bool) -> list[int]:
    """A text as the tokenizer encodes it, special tokens included; those behind a text that is to go on are left out.

    Args:
      whole: an encoder reads the text, to its end.
    """
    encoding = tokenizer(text, return_special_tokens_mask=True)
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    while ids and special[len(ids) - 1] and not whole:
        ids = ids[:-1]
    return ids


def protocol(trial: Trial, rows: Sequence[ModelResult], lm: LM, seed: int) -> dict[str, Any]:
    """How the numbers were obtained, as the report prints it; `lm` is the model of the first of the `rows`."""
    held_out, settings, data, tokenizer = rows[0].held_out, trial.settings, trial.data, lm.tokenizer
    assert held_out is not None
    columns = {name: sum(held_out.columns[name]) for name in ("tokens", "bytes", "words") if name in held_out.columns}
    packed = "segment_ids" in trial.task.columns
    rows_are = (
        {
            "context": f"{data.max_length} tokens",
            "stride": f"{data.max_length} tokens: rows do not overlap, so a row's first tokens are read with little "
            "context",
        }
        if packed
        else {"context": f"whole examples, cut at {data.max_length} tokens, padded to {data.buckets} lengths at most"}
    )
    unread = trial.prepared(lm).facts.get("truncated_words", 0)
    what = f"batches of {settings.batch_size} rows of running text" if packed else "examples"
    return {
        "task": trial.name,
        "corpus": settings.corpus,
        "split": f"{settings.split}: {getattr(data, settings.split)}",
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens",
        **rows_are,
        **{name: f"{int(total):,}" for name, total in columns.items()},
        **({"words not read": f"{unread:,}, beyond the context or without a token: not scored"} if unread else {}),
        "pieces": f"{held_out.num_examples:,} {what}",
        "intervals": "two standard errors by leaving out one example at a time (jackknife); of a difference between "
        "two models, by leaving the same example out of both",
        "machine": machine(),
        "versions": versions(),
        "seeds": str(seed),
        "timing": (
            f"forward passes over {settings.batch_size} rows of the median length ({rows[0].batch_tokens} tokens; "
            f"batch) and one of them (latency), all models in turn, medians of "
            f"{len(rows[0].batch.seconds) if rows[0].batch else 0} rounds"
        ),
        "memory": "of the compiled pass over that batch: parameters, input, temporaries and result, as the compiler "
        "allots them",
    }
