"""A stage: a function from a model directory (or nothing) to a model directory.

`run` reads from top to bottom: model and data, surgery, methods, training, baking, evaluation, `result.json`.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.build.assembly import Ready, assemble
from jaxlm.build.config import plain
from jaxlm.build.records import params_sha256, peak_memory, remember, write_json
from jaxlm.build.setting import Setting, on_mesh, operate, set_up, split_evaluator
from jaxlm.core import Axes, Tree
from jaxlm.io.model import LM, save
from jaxlm.models.model import Model
from jaxlm.nn.stack import canonical_view
from jaxlm.parallel import unpad_vocab
from jaxlm.train.journal import Journal
from jaxlm.train.loop import flatten_state, train, unflatten_state
from jaxlm.train.step import TrainState


def run(config: Any, workdir: Path, name: str = "train") -> dict[str, Any]:
    """Runs a stage to its end and returns what `workdir/result.json` holds.

    A run that was cut off goes on from its last checkpoint; a finished one is returned at once.

    Raises:
      ValueError: when `workdir` holds a run of another config.
    """
    started, workdir = time.perf_counter(), workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    remember(plain(config), workdir)
    if (workdir / "result.json").exists():
        return json.loads((workdir / "result.json").read_text())
    journal = Journal(workdir, name)
    setting = operate(set_up(config, say=journal.say))
    training = setting.training
    facts: dict[str, Any] = {"steps": 0, "tokens": 0, "train_seconds": 0.0, "compile_seconds": 0.0}
    if training.steps or training.epochs:
        ready = assemble(setting, workdir, journal)
        journal.expect(ready.run.steps)
        with journal:
            state, progress = train(ready.run, ready.state)
        facts = {
            "steps": int(state.step),
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "train_seconds": round(progress.seconds, 3),
            "compile_seconds": round(progress.compile_seconds, 3),
            "waited_seconds": round(progress.waited_seconds, 3),
            "skipped_updates": progress.skipped,
        }
        model, params, axes = finish(setting, ready, state)
    else:
        model, params, axes = setting.model, setting.params, setting.axes
    site_axes = {path: names for path, names in axes.items() if path not in model.axes()}
    save(LM(model.config, params, setting.tokenizer, site_axes), workdir / "model")
    result = facts | measure(setting, model, params, axes, workdir)
    result |= {
        "params_sha256": params_sha256(params),
        "peak_memory_bytes": peak_memory(),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(workdir / "result.json", result)
    return result


def finish(setting: Setting, ready: Ready, state: TrainState) -> tuple[Model, Tree, dict[str, Axes]]:
    """The trained model in the canonical view: averaged, without vocabulary padding, baked."""
    last = ready.run.settings.average_last
    if last > 1:
        from jaxlm.merge.average import average

        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, ready.run.shardings
        )
        flats = [ready.run.store.restore(flatten_state(target), step) for step in ready.run.store.steps()[-last:]]
        state = state.replace(params=average([unflatten_state(state, f[1]).params for f in flats if f]))
    params = ready.method.eval_params(state.params, state.method)
    params = canonical_view(unpad_vocab(params, ready.axes, setting.model.config.vocab_size))
    if not setting.config["bake"]:
        return setting.model, params, ready.axes
    return ready.method.bake(setting.model, params, ready.axes, state.method)


def measure(setting: Setting, model: Model, params: Tree, axes: Mapping[str, Axes], workdir: Path) -> dict[str, Any]:
    """Metrics of the final model on eval and test, and their tables in `workdir/report.txt`."""
    placed = on_mesh(setting, model, model.run_view(params), axes)
    metrics, tables = {}, []
    for split in ("eval", "test"):
        score = split_evaluator(setting, model, split)
        if score is not None:
            result = score(placed)
            metrics[split] = result.metrics
            tables += [f"{split}\n{result.report}"] if result.report else []
    if tables:
        (workdir / "report.txt").write_text("\n".join(tables))
    facts = {split: prepared.facts for split, prepared in setting.splits.items() if prepared.facts}
    return {"metrics": metrics, "data": facts}
