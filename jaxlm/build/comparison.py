"""Measures several models beside each other: quality on the same text, size, and speed in turn, in one process."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Context
from jaxlm.data.loader import Batches
from jaxlm.evaluate.cost import bytes_by_dtype, bytes_on_disk, flops_per_token, parameters
from jaxlm.evaluate.row import HeldOut, Row
from jaxlm.evaluate.timing import Timing, interleaved, machine, versions
from jaxlm.io.model import LM, load
from jaxlm.losses.cross_entropy import IGNORED, log_likelihood
from jaxlm.models.generate import generate
from jaxlm.models.model import Model


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
      name, description: for the report.
      directory: its model directory.
      reference: name of the candidate it is measured against, `None` for the reference itself.
      beside: further candidates worth a sentence.
      train_tokens: tokens it was trained on.
    """

    name: str
    description: str
    directory: Path
    reference: str | None = None
    beside: tuple[str, ...] = ()
    train_tokens: int | None = None


@dataclass(frozen=True)
class Trial:
    """What causal models are asked to do.

    Attributes:
      batches: held-out text in order, each token once.
      tokenizer: the common one.
      context: tokens of a row.
      batch_size: rows of a timed batch.
      prompt: text to continue; new_tokens: how far.
      rounds, seconds: timing rounds and the time they may take.
    """

    batches: Batches
    tokenizer: Any
    context: int
    batch_size: int
    prompt: str
    new_tokens: int = 48
    rounds: int = 15
    seconds: float = 20.0


def compare_models(candidates: Sequence[Candidate], trial: Trial, say: Callable[[str], None]) -> list[Row]:
    """One Row a candidate. Agreement is measured with the first of them."""
    models = {c.name: load(c.directory) for c in candidates}
    run = {name: Model(lm.config).run_view(lm.params) for name, lm in models.items()}
    say("measuring quality")
    answers: list[np.ndarray] | None = None
    held_out = {}
    for candidate in candidates:
        lm = models[candidate.name]
        held_out[candidate.name], own = read_held_out(lm, run[candidate.name], trial, answers)
        answers = own if answers is None else answers
    say("measuring speed, all models in turn")
    batch, single = time_models(models, run, trial)
    rows = []
    for candidate in candidates:
        lm = models[candidate.name]
        sample, speed = write_sample(lm, run[candidate.name], trial)
        counts = parameters(lm.params)
        rows.append(
            Row(
                name=candidate.name,
                description=candidate.description,
                parameters=counts.total,
                parameters_non_embedding=counts.non_embedding,
                bytes_on_disk=bytes_on_disk(candidate.directory),
                bytes_by_dtype=bytes_by_dtype(candidate.directory),
                reference=candidate.reference,
                beside=candidate.beside,
                flops_per_token=flops_per_token(
                    Model(lm.config).unshared(lm.params),
                    context=trial.context,
                    heads=lm.config.num_heads,
                    head_dim=lm.config.layers()[0].head_dim,
                    causal=lm.config.causal,
                    tied_head=lm.config.tie_embeddings,
                ),
                batch=batch[candidate.name],
                batch_tokens=trial.batch_size * trial.context,
                single=single[candidate.name],
                held_out=held_out[candidate.name],
                train_tokens=candidate.train_tokens,
                prompt=trial.prompt,
                sample=sample,
                sample_tokens_per_second=speed,
            )
        )
    return rows


def read_held_out(
    lm: LM, params: Any, trial: Trial, answers: list[np.ndarray] | None
) -> tuple[HeldOut, list[np.ndarray]]:
    """Nats, tokens, bytes and agreement batch by batch, and the model's own likeliest tokens."""
    model = Model(lm.config)

    @jax.jit
    def read(params: Any, batch: dict[str, jax.Array]):
        logits = model.forward(params, batch)["logits"]
        likelihood, valid = log_likelihood(logits, batch["labels"])
        return -jnp.sum(likelihood), jnp.sum(valid), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    nats, tokens, sizes, agreed, own = [], [], [], [], []
    for number in range(trial.batches.steps_per_epoch):
        batch = trial.batches(number)
        loss, count, likeliest = jax.device_get(read(params, batch))
        counted = batch["labels"] != IGNORED
        texts = trial.tokenizer.batch_decode(
            [row[keep] for row, keep in zip(batch["labels"], counted, strict=True)], skip_special_tokens=True
        )
        nats.append(float(loss))
        tokens.append(int(count))
        sizes.append(sum(len(text.encode("utf8")) for text in texts))
        own.append(likeliest)
        if answers is not None:
            agreed.append(int(((answers[number] == likeliest) & counted).sum()))
    held_out = HeldOut(tuple(nats), tuple(tokens), tuple(sizes), tuple(agreed) if answers is not None else None)
    return held_out, own


def time_models(
    models: Mapping[str, LM], run: Mapping[str, Any], trial: Trial
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Seconds of a forward pass over a full batch and over one row, all models in turn."""
    ids = trial.batches(0)["input_ids"]
    many = np.resize(ids, (trial.batch_size, trial.context))

    def thunk(name: str, rows: np.ndarray) -> Callable[[], jax.Array]:
        model, params = Model(models[name].config), run[name]
        forward = jax.jit(lambda params, ids: model.forward(params, {"input_ids": ids}, ctx=Context())["logits"])
        placed = jnp.asarray(rows)
        return lambda: forward(params, placed)

    def measure(rows: np.ndarray) -> dict[str, Timing]:
        return interleaved({name: thunk(name, rows) for name in models}, trial.rounds, trial.seconds)

    return measure(many), measure(many[:1])


def write_sample(lm: LM, params: Any, trial: Trial) -> tuple[str, float]:
    """What the model writes after the prompt (temperature 0.8, top-p 0.9, one seed for all), and its tokens/s.

    A model with few positions gets at most half of them as prompt, and stops at the last one.
    """
    prompt = trial.tokenizer(trial.prompt, add_special_tokens=False)["input_ids"]
    room = lm.config.max_positions or 2 * (len(prompt) + trial.new_tokens)
    ids = np.asarray(prompt[: room // 2], np.int32)[None]
    new_tokens = min(trial.new_tokens, room - ids.shape[1])
    options = {"new_tokens": new_tokens, "temperature": 0.8, "top_p": 0.9}

    def write() -> np.ndarray:
        return np.asarray(generate(lm.config, params, {"input_ids": ids}, jax.random.key(0), **options))

    tokens = write()
    started = time.perf_counter()
    write()
    seconds = time.perf_counter() - started
    return trial.tokenizer.decode(tokens[0], skip_special_tokens=True), new_tokens / seconds


def protocol(trial: Trial, corpus: str, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """How the numbers were obtained, as the report prints it."""
    held_out = rows[0].held_out
    assert held_out is not None
    return {
        "corpus": corpus,
        "tokenizer": f"{type(trial.tokenizer).__name__}, {len(trial.tokenizer)} tokens",
        "context": f"{trial.context} tokens",
        "stride": f"{trial.context} tokens: rows do not overlap, so a row's first tokens are read with little context",
        "bytes": f"{sum(held_out.bytes):,}",
        "tokens": f"{sum(held_out.tokens):,}",
        "machine": machine(),
        "versions": versions(),
        "seeds": str(seed),
        "timing": (
            f"forward passes over {trial.batch_size} x {trial.context} tokens (batch) and 1 x {trial.context} "
            f"(latency), all models in turn, medians of {len(rows[0].batch.seconds) if rows[0].batch else 0} rounds"
        ),
    }
