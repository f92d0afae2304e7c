"""A stage: a function from a model directory (or nothing) to a model directory.

`run` reads from top to bottom: model and data, surgery, methods, training, baking, evaluation, `result.json`.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax

from jaxlm.core import lookup
from jaxlm.core.cpu import fast_bfloat16, here
from jaxlm.core.strict_json import strict
from jaxlm.data.tokenizer import padding_id
from jaxlm.io.fingerprint import params_sha256
from jaxlm.io.lm import LM
from jaxlm.io.pretrained import save
from jaxlm.methods.merge.average import average
from jaxlm.nn.stack import canonical_view
from jaxlm.parallel import unpad_vocab
from jaxlm.parallel.batches import gather_to_host
from jaxlm.runner.artifacts import (
    check_same_config,
    check_same_data,
    peak_memory,
    room_on_disk,
    write_json,
    write_provenance,
)
from jaxlm.runner.config import default_config, overlay, plain
from jaxlm.runner.run_setup import RunSetup, apply_surgery, on_mesh, prepare_run, split_evaluator
from jaxlm.runner.trainer import TrainerInputs, build_trainer
from jaxlm.train.checkpointing import Progress
from jaxlm.train.loop import train
from jaxlm.train.metric_writer import MetricWriter
from jaxlm.train.step import TrainState

LAYOUTS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "transformers": lambda config: {},
    "native": lambda config: {"native": True},
    "padded": lambda config: {"padded": True},
    "adapter": lambda config: {"base": config.model.init},
}
"""`config -> options of save` by `config.layout`."""


def run(config: Any, workdir: Path, name: str = "train") -> dict[str, Any]:
    """Runs a stage to its end and returns what `workdir/result.json` holds.

    A run that was cut off goes on from its last checkpoint; a finished one is returned at once.

    Raises:
      ValueError: when `workdir` holds a run of another config, or over data that have changed since.
      OSError: when the disk is full; the same command goes on once it is not.
    """
    started, workdir = time.perf_counter(), workdir.resolve()
    layout = lookup(LAYOUTS, config.layout, "layout")(config)
    check_adapter(config)
    check_same_config(plain(config), workdir)
    data = check_same_data(config, workdir)
    if (workdir / "result.json").exists():
        return json.loads((workdir / "result.json").read_text())
    trains = bool(config.train.steps or config.train.epochs)
    splits = ("train", "eval", "test") if trains else ("eval", "test")
    with room_on_disk(workdir), MetricWriter(workdir, name) as writer:
        setup = apply_surgery(prepare_run(config, splits, writer.info))
        if trains:
            lm, facts = train_model(setup, workdir, writer, data)
        else:
            write_provenance(setup.config, workdir, data)
            lm, facts = setup.lm, training_summary(Progress())
        if writer.writes:  # before it is measured: whatever becomes of the scores, the model is there
            save(with_padding_id(lm), workdir / "model", **layout)
        measured = measure(setup, lm, workdir)
        result = facts | measured | {"metrics": facts["metrics"] | measured["metrics"]}
        result = strict(result | peak_memory() | {"seconds": round(time.perf_counter() - started, 3)})
        if writer.writes:
            write_json(workdir / "result.json", result)
    return result


def check_adapter(config: Any) -> None:
    """Raises ValueError where a model is to be stored as an adapter, and would not be one."""
    if config.layout != "adapter":
        return
    if not config.model.init:
        raise ValueError("config.layout = 'adapter' stores what a run adds to config.model.init, which is empty")
    if config.methods and config.bake:
        raise ValueError(
            "config.layout = 'adapter': baking folds what the methods add into the weights of config.model.init; "
            "set config.bake = False"
        )


def with_padding_id(lm: LM) -> LM:
    """The model to write: its config names the padding that its tokenizer uses."""
    if lm.config.position_offset:  # a RoBERTa counts positions from its own, which `check_fit` holds to be the same
        return lm
    return lm.replace(config=lm.config.replace(pad_token_id=padding_id(lm.tokenizer)))


def train_model(
    setup: RunSetup, workdir: Path, writer: MetricWriter, data: Mapping[str, Any]
) -> tuple[LM, dict[str, Any]]:
    """The trained model, and what training took."""
    if setup.training.dtype == "bfloat16" and jax.default_backend() == "cpu" and not fast_bfloat16():
        writer.info(
            f"config.train.dtype = bfloat16: this CPU ({here() or 'of unknown kind'}) has no instructions for it, so "
            "float32 is faster here"
        )
    inputs = build_trainer(setup, workdir, writer)
    write_provenance(setup.config, workdir, data)  # not before: a config that does not work leaves nothing behind
    with contextlib.closing(inputs.run.stores):
        state, progress = train(inputs.run, inputs.state)
        return final_model(setup, inputs, state), training_summary(progress) | inputs.facts


def training_summary(progress: Progress) -> dict[str, Any]:
    """What `result.json` says of training."""
    return {
        "steps": progress.steps,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "train_seconds": round(progress.seconds, 3),
        "compile_seconds": round(progress.compile_seconds, 3),
        "waited_seconds": round(progress.waited_seconds, 3),
        "skipped_updates": progress.skipped,
        "metrics": {split: values for split, values in progress.metrics.items() if split == "train"},
    }


def final_model(setup: RunSetup, inputs: TrainerInputs, state: TrainState) -> LM:
    """The trained model in the canonical view: without vocabulary padding, baked, averaged."""
    run = inputs.run
    if run.stores.recent is None:
        return baked(setup, inputs, state)
    steps = run.stores.recent.steps()[-run.settings.average_last :]
    states = [run.stores.restore_model(run.stores.recent, step, state, run.shardings) for step in steps]
    try:
        lm = averaged([baked(setup, inputs, recent) for recent in states])
    except ValueError as codes:
        # What trained with quantization bakes to codes, which have no mean: the mean of what they round has.
        try:
            mean = state.replace(params=average([recent.params for recent in states]))
            lm = baked(setup, inputs, mean)
        except ValueError:
            run.writer.info(f"steps {', '.join(map(str, steps))} have no average, the last of them is kept: {codes}")
            return baked(setup, inputs, states[-1])
    run.writer.info(f"averaged steps {', '.join(map(str, steps))}")
    return lm


def averaged(models: Sequence[LM]) -> LM:
    """Baked checkpoints of one run as one model: the functions are averaged, not the parts that they are made of.

    Raises:
      ValueError: where their structures differ, or they hold codes that do.
    """
    last = models[-1]
    if any(lm.config != last.config for lm in models):
        raise ValueError("the widths of the layers changed between them")
    return last.replace(params=average([lm.params for lm in models]))


def baked(setup: RunSetup, inputs: TrainerInputs, state: TrainState) -> LM:
    """The model in a state: canonical view, without vocabulary padding, baked unless the config says not to."""
    method, lm = inputs.method, inputs.lm
    params, method_state = gather_to_host((method.eval_params(state.params, state.method), state.method))
    lm = lm.replace(params=canonical_view(unpad_vocab(params, lm.axes, lm.config.vocab_size)))
    return cast(LM, method.bake(lm, method_state)) if setup.config["bake"] else lm


def measure(setup: RunSetup, lm: LM, workdir: Path) -> dict[str, Any]:
    """Metrics of the final model on eval and test, their tables in `workdir/report.txt`, and its hash."""
    placed = on_mesh(setup, lm)
    metrics, tables = {}, []
    for split in ("eval", "test"):
        score = split_evaluator(setup, lm.network, split)
        if score is not None:
            result = score(placed)
            metrics[split] = result.metrics
            tables += [f"{split}\n{result.report}"] if result.report else []
    if tables and jax.process_index() == 0:
        (workdir / "report.txt").write_text("\n".join(tables))
    facts: dict[str, Any] = {split: prepared.facts for split, prepared in setup.splits.items() if prepared.facts}
    if setup.calibration is not None:
        facts["calibration"] = setup.calibration
    return {"metrics": metrics, "data": facts, "params_sha256": params_sha256(lm.params)}


def evaluate(config: Any, directory: str, workdir: Path) -> dict[str, Any]:
    """The metrics of a model directory on the eval and test data of a config, as training writes them.

    The model's own tokenizer and labels are used, whatever the config trains. Padded batches have the lengths that fit
    these data, so that sums may differ from those of training in their last bits.
    """
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    settings = default_config()
    overlay(
        settings, {k: v for k, v in plain(config).items() if k not in ("stages", "report", "search", "model")}, "config"
    )
    settings.model.init, settings.data.tokenizer, settings.data.train = str(directory), "", ""
    setup = prepare_run(settings, splits=("eval", "test"))
    if not setup.splits:
        raise ValueError("nothing to measure: set config.data.eval or config.data.test")
    measured = measure(setup, setup.lm, workdir)
    result = strict({"model": str(directory)} | measured)
    write_json(workdir / "result.json", result)
    return result
