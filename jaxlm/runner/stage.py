"""A stage: a function from a model directory (or nothing) to a model directory.

`run` reads from top to bottom: model and data, surgery, methods, training, baking, evaluation, `result.json`.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.core import Axes, Tree, lookup
from jaxlm.core.cpu import fast_bfloat16, here
from jaxlm.core.strict_json import strict
from jaxlm.data.tokenizer import padding_id
from jaxlm.io.pretrained import LM, save
from jaxlm.methods.merge.average import average
from jaxlm.models.network import Network
from jaxlm.nn.stack import canonical_view
from jaxlm.parallel import unpad_vocab
from jaxlm.parallel.batches import gather_to_host
from jaxlm.runner.artifacts import (
    params_sha256,
    peak_memory,
    refuse_changed,
    refuse_other,
    remember,
    room_on_disk,
    write_json,
)
from jaxlm.runner.config import default_config, overlay, plain
from jaxlm.runner.run_setup import Setting, on_mesh, operate, set_up, split_evaluator
from jaxlm.runner.trainer import TrainerInputs, assemble
from jaxlm.train.checkpointing import Progress
from jaxlm.train.loop import train
from jaxlm.train.metric_writer import MetricWriter
from jaxlm.train.step import TrainState

LAYOUTS = {"transformers": {}, "native": {"native": True}, "padded": {"padded": True}}
"""How `config.layout` has a model written."""


def run(config: Any, workdir: Path, name: str = "train") -> dict[str, Any]:
    """Runs a stage to its end and returns what `workdir/result.json` holds.

    A run that was cut off goes on from its last checkpoint; a finished one is returned at once.

    Raises:
      ValueError: when `workdir` holds a run of another config, or over data that have changed since.
      OSError: when the disk is full; the same command goes on once it is not.
    """
    started, workdir = time.perf_counter(), workdir.resolve()
    layout = lookup(LAYOUTS, config.layout, "layout")
    refuse_other(plain(config), workdir)
    data = refuse_changed(config, workdir)
    if (workdir / "result.json").exists():
        return json.loads((workdir / "result.json").read_text())
    trains = bool(config.train.steps or config.train.epochs)
    with room_on_disk(workdir), MetricWriter(workdir, name) as writer:
        setting = operate(set_up(config, ("train", "eval", "test") if trains else ("eval", "test"), info=writer.info))
        if trains:
            trained, facts = learn(setting, workdir, writer, data)
        else:
            remember(setting.config, workdir, data)
            trained, facts = Trained(setting.model, setting.params, setting.axes), told(Progress())
        if writer.writes:  # before it is measured: whatever becomes of the scores, the model is there
            save(carrier(setting, trained), workdir / "model", **layout)
        measured = measure(setting, trained, workdir)
        result = facts | measured | {"metrics": facts["metrics"] | measured["metrics"]}
        result = strict(result | peak_memory() | {"seconds": round(time.perf_counter() - started, 3)})
        if writer.writes:
            write_json(workdir / "result.json", result)
    return result


def carrier(setting: Setting, trained: "Trained") -> LM:
    """The model to write: with what its directory carried, the tokenizer it was read with, and the padding id used."""
    config = trained.model.config
    if not config.position_offset:  # a RoBERTa counts positions from its own, which `check_fit` holds to be the same
        config = config.replace(pad_token_id=padding_id(setting.tokenizer))
    own = trained.model.axes()
    site_axes = {path: names for path, names in trained.axes.items() if path not in own}
    return LM(config, trained.params, setting.tokenizer_source, site_axes, setting.carried)


class Trained(NamedTuple):
    """The model of a stage, canonical view."""

    model: Network
    params: Tree
    axes: dict[str, Axes]


def learn(
    setting: Setting, workdir: Path, writer: MetricWriter, data: Mapping[str, Any]
) -> tuple[Trained, dict[str, Any]]:
    """The trained model, and what training took."""
    if setting.training.dtype == "bfloat16" and jax.default_backend() == "cpu" and not fast_bfloat16():
        writer.info(
            f"config.train.dtype = bfloat16: this CPU ({here() or 'of unknown kind'}) has no instructions for it, so "
            "float32 is faster here"
        )
    ready = assemble(setting, workdir, writer)
    remember(setting.config, workdir, data)  # not before: a config that does not work leaves nothing behind
    with contextlib.closing(ready.run.stores):
        state, progress = train(ready.run, ready.state)
        return finish(setting, ready, state), told(progress) | ready.facts


def told(progress: Progress) -> dict[str, Any]:
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


def finish(setting: Setting, ready: TrainerInputs, state: TrainState) -> Trained:
    """The trained model in the canonical view: without vocabulary padding, baked, averaged."""
    run = ready.run
    if run.stores.recent is None:
        return finished(setting, ready, state)
    steps = run.stores.recent.steps()[-run.settings.average_last :]
    states = [run.stores.restore_model(run.stores.recent, step, state, run.shardings) for step in steps]
    try:
        found = averaged([finished(setting, ready, each) for each in states])
    except ValueError as codes:
        # What trained with quantization bakes to codes, which have no mean: the mean of what they round has.
        try:
            mean = state.replace(params=average([each.params for each in states]))
            found = finished(setting, ready, mean)
        except ValueError:
            run.writer.info(f"steps {', '.join(map(str, steps))} have no average, the last of them is kept: {codes}")
            return finished(setting, ready, states[-1])
    run.writer.info(f"averaged steps {', '.join(map(str, steps))}")
    return found


def averaged(models: Sequence[Trained]) -> Trained:
    """Baked checkpoints of one run as one model: the functions are averaged, not the parts that they are made of.

    Raises:
      ValueError: where their structures differ, or they hold codes that do.
    """
    last = models[-1]
    if any(each.model != last.model for each in models):
        raise ValueError("the widths of the layers changed between them")
    return last._replace(params=average([each.params for each in models]))


def finished(setting: Setting, ready: TrainerInputs, state: TrainState) -> Trained:
    """The model in a state: canonical view, without vocabulary padding, baked unless the config says not to."""
    method = ready.method
    params, method_state = gather_to_host((method.eval_params(state.params, state.method), state.method))
    params = canonical_view(unpad_vocab(params, ready.axes, setting.model.config.vocab_size))
    if not setting.config["bake"]:
        return Trained(setting.model, params, ready.axes)
    return Trained(*method.bake(setting.model, params, ready.axes, method_state))


def measure(setting: Setting, trained: Trained, workdir: Path) -> dict[str, Any]:
    """Metrics of the final model on eval and test, their tables in `workdir/report.txt`, and its hash."""
    model, params, axes = trained
    placed = on_mesh(setting, model, model.run_view(params), axes)
    metrics, tables = {}, []
    for split in ("eval", "test"):
        score = split_evaluator(setting, model, split)
        if score is not None:
            result = score(placed)
            metrics[split] = result.metrics
            tables += [f"{split}\n{result.report}"] if result.report else []
    if tables and jax.process_index() == 0:
        (workdir / "report.txt").write_text("\n".join(tables))
    facts: dict[str, Any] = {split: prepared.facts for split, prepared in setting.splits.items() if prepared.facts}
    if setting.calibration is not None:
        facts["calibration"] = setting.calibration
    return {"metrics": metrics, "data": facts, "params_sha256": params_sha256(params)}


def evaluate(config: Any, directory: str, workdir: Path) -> dict[str, Any]:
    """The metrics of a model directory on the eval and test data of a config, as training writes them.

    The model's own tokenizer and labels are used, whatever the config trains. Padded batches have the lengths that fit
    these data, so that sums may differ from those of training in their last bits.
    """
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    own = default_config()
    overlay(own, {k: v for k, v in plain(config).items() if k not in ("stages", "report", "search", "model")}, "config")
    own.model.init, own.data.tokenizer, own.data.train = str(directory), "", ""
    setting = set_up(own, splits=("eval", "test"))
    if not setting.splits:
        raise ValueError("nothing to measure: set config.data.eval or config.data.test")
    measured = measure(setting, Trained(setting.model, setting.params, setting.axes), workdir)
    result = strict({"model": str(directory)} | measured)
    write_json(workdir / "result.json", result)
    return result
