"""A stage: a function from a model directory (or nothing) to a model directory.

`run` reads from top to bottom: model and data, surgery, methods, training, baking, evaluation, `result.json`.
"""

import dataclasses
import json
import math
import platform
import re
import resource
import subprocess
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.build import registry
from jaxlm.build.config import plain, set_fields
from jaxlm.build.data import batch_shapes, prepare, to_devices, tokenizer_for
from jaxlm.build.evaluation import evaluator
from jaxlm.core import (
    Axes,
    Context,
    Loss,
    Method,
    Tree,
    arrays,
    chain,
    check_rules,
    describe,
    first_match,
    lookup,
    trainable,
    with_arrays,
)
from jaxlm.data.loader import shard
from jaxlm.data.prefetch import prefetch
from jaxlm.data.settings import DataSettings
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.io.model import LM, load, save
from jaxlm.losses.distillation import Teacher
from jaxlm.models import model_config
from jaxlm.models.model import Model
from jaxlm.nn.stack import canonical_view
from jaxlm.parallel import make_mesh, make_rules, pad_vocab, place, shard_tree, shardings, unpad_vocab, ways
from jaxlm.tasks import TASKS, Prepared, Task
from jaxlm.train.gradient import accumulate, gradient
from jaxlm.train.journal import Journal
from jaxlm.train.loop import Run, flatten_state, train, unflatten_state
from jaxlm.train.optimizer import decays, optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, create_state, make_step


@dataclass(frozen=True)
class Setting:
    """What a stage works on, before any method: model, parameters, data, mesh.

    Attributes:
      config: plain values; data, training: its sections as objects.
      task, tokenizer, splits: what is learned, and the encoded data by split.
      model, params, axes: canonical view.
      mesh, rules: placement.
    """

    config: dict[str, Any]
    data: DataSettings
    training: TrainSettings
    task: Task
    tokenizer: Any
    splits: dict[str, Prepared]
    model: Model
    params: Tree
    axes: dict[str, Axes]
    mesh: jax.sharding.Mesh
    rules: Mapping[str, Any]

    @property
    def ctx(self) -> Context:
        return Context(place=place(self.mesh, self.rules))

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.training.dtype)

    def key(self, name: str) -> jax.Array:
        """The key of one use of randomness."""
        return key_of(self.config["seed"], name)


def key_of(seed: int, name: str) -> jax.Array:
    """The key of one use of randomness in a run."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def set_up(config: Any, splits: tuple[str, ...] = ("train", "eval", "test"), say=print) -> Setting:
    """Reads model and data of a config; `splits` are encoded where the config names a place for them."""
    data, training = DataSettings(**config.data), TrainSettings(**config.train)
    task = lookup(TASKS, config.task, "task")
    key = key_of(config.seed, "init")
    labels = task.labels(data.source("train")) if data.train else ()
    lm = None
    if config.model.init:
        lm = starting_model(config, task, labels, key, say)
        tokenizer = tokenizer_for(data, config.task, lm.tokenizer)
        model, params = Model(lm.config), lm.params
    else:
        tokenizer = tokenizer_for(data, config.task, None)
        model = Model(fresh_config(config, task, labels, tokenizer))
        params = model.init(key)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's table {model.config.vocab_size} rows")
    mesh, axes = make_mesh(config.mesh), model.axes() if lm is None else lm.axes
    prepared = {
        s: prepare(config.task, task, tokenizer, model.config.labels, data, s, say) for s in splits if getattr(data, s)
    }
    rules = make_rules(config.sharding, axes, mesh)
    return Setting(plain(config), data, training, task, tokenizer, prepared, model, params, axes, mesh, rules)


def starting_model(config: Any, task: Task, labels: tuple[str, ...], key: jax.Array, say=print) -> LM:
    """The model of `config.model.init` with the task's head; leaves that it lacks are initialised and named.

    Raises:
      ValueError: for a field of `config.model` that would change the stored parameters' shapes.
    """
    init, head = config.model.init, task.structure["head"]
    regression = task.structure.get("regression", False)
    lm = load(init, head=head, labels=labels or None, regression=regression, key=key)
    if task.structure.get("next_sentence") and not lm.config.next_sentence:
        raise ValueError(f"{init} has no next-sentence head; train it with config.task = 'masked'")
    if lm.fresh:
        say(f"{init}: initialised {', '.join(lm.fresh)}")
    if lm.dropped:
        say(f"{init}: left out {', '.join(lm.dropped)}")
    fields = {n: v for n, v in set_fields(config.model).items() if n not in ("init", "family")}
    changed = Model(lm.config.replace(**fields))
    if changed.abstract() != Model(lm.config).abstract():
        raise ValueError(f"config.model.{', '.join(fields)} would change the parameters of {init}; leave them out")
    return dataclasses.replace(lm, config=changed.config)


def fresh_config(config: Any, task: Task, labels: tuple[str, ...], tokenizer: Any) -> Any:
    """The structure of a new model: the family's defaults, the config's fields, the task's head, the tokenizer."""
    fields = {n: v for n, v in set_fields(config.model).items() if n != "init"}
    family = fields.pop("family", "gpt2")
    given = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if family == "t5":
        given["decoder_start_token_id"] = tokenizer.pad_token_id
    return model_config(family, **{**given, "labels": labels, **task.structure, **fields})


def teacher(directory: str, setting: Setting) -> Teacher:
    """A model directory as a teacher of this run: on the same mesh, deterministic, in the same dtype."""
    lm = load(directory)
    if lm.config.vocab_size != setting.model.config.vocab_size or lm.config.labels != setting.model.config.labels:
        raise ValueError(
            f"teacher {directory} has {lm.config.vocab_size} tokens and labels {lm.config.labels}, the student "
            f"{setting.model.config.vocab_size} and {setting.model.config.labels}; both must be equal"
        )
    if lm.tokenizer is not None and lm.tokenizer.get_vocab() != setting.tokenizer.get_vocab():
        raise ValueError(f"teacher {directory} has another tokenizer; distillation compares token by token")
    model = Model(lm.config)
    ctx, dtype, options = setting.ctx, setting.dtype, {"remat": "none"}

    def forward(params: Tree, batch: dict, taps) -> dict[str, Any]:
        return model.forward(params, batch, ctx=ctx, taps=taps, dtype=dtype, **options)

    params = on_mesh(setting, model, model.run_view(lm.params), model.axes())
    return Teacher(forward, params, lm.config.num_layers, lm.config.hidden_size)


def on_mesh(setting: Setting, model: Model, params: Tree, axes: Mapping[str, Axes]) -> dict[str, Any]:
    """Parameters (run view) padded to a vocabulary that divides, on the devices."""
    padded = pad_vocab(params, axes, ways("vocab", setting.mesh, setting.rules))
    return shard_tree(padded, shardings(padded, axes, setting.mesh, setting.rules, model.sizes()))


def methods_of(setting: Setting) -> Method:
    """The chain of `config.methods`, then `config.losses`."""
    named = [registry.method(entry) for entry in setting.config["methods"]]
    for entry in setting.config["losses"]:
        given = {"teacher": teacher(entry["teacher"], setting)} if "teacher" in entry else {}
        rest = {k: v for k, v in entry.items() if k != "teacher"}
        named.append((entry.get("name", ""), registry.make(registry.LOSSES, rest, "losses", **given)))
    return chain(named)


def operate(setting: Setting) -> Setting:
    """The setting after `config.surgery`."""
    model, params, axes = setting.model, setting.params, setting.axes
    for entry in setting.config["surgery"]:
        model, params, axes = registry.make(registry.SURGERY, entry, "surgery", model=model, params=params, axes=axes)
    return dataclasses.replace(setting, model=model, params=params, axes=axes)


class Ready(NamedTuple):
    """A run that can start: the step not yet compiled, its state on the devices, and how to read the state."""

    run: Run
    state: TrainState
    method: Method
    axes: dict[str, Axes]


def assemble(setting: Setting, workdir: Path, journal: Journal) -> Ready:
    """Methods, loss, gradient, optimizer and data of `setting`, joined into a Run."""
    training, model = setting.training, setting.model
    method = methods_of(setting)
    adapted = method.init(setting.key("methods"), model, setting.params, setting.axes)
    freeze = rule_verdict(training, describe(adapted.params).values())
    verdicts = [method.trainable, freeze]

    def base(taps: frozenset) -> Loss:
        def fn(params: Tree, constants: dict, batch: dict, ctx: Context):
            outputs = model.forward(params, batch, ctx=ctx, taps=taps, remat=training.remat, dtype=setting.dtype)
            return setting.task.loss(outputs, batch), outputs

        return Loss(fn, taps)

    taps = method.loss(base(frozenset())).taps  # what the transforms read is known once they are applied
    loss = method.loss(base(taps))
    grad = method.grad(accumulate(gradient(loss, verdicts), loss, training.grad_accum))

    params = model.run_view(adapted.params, layer_verdict(adapted.params, verdicts, training), tap_breaks(taps, model))
    params = pad_vocab(params, adapted.axes, ways("vocab", setting.mesh, setting.rules))
    where = shardings(params, adapted.axes, setting.mesh, setting.rules, model.sizes())
    infos = {n: i for n, i in describe(params).items() if trainable(verdicts, i)}
    if not infos:
        raise ValueError("nothing trains: config.train.trainable and the methods freeze every parameter")

    batches = setting.task.batches(
        setting.splits["train"], setting.tokenizer, setting.data, training.batch_size, setting.config["seed"]
    )
    steps = training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch))
    tx = optimizer(training, steps, infos)
    replicated = jax.sharding.NamedSharding(setting.mesh, jax.P())
    abstract = jax.eval_shape(lambda p, m: create_state(p, m, tx, verdicts), params, adapted.state)
    placement = state_shardings(abstract, where, replicated)
    create = jax.jit(lambda p, m: create_state(p, m, tx, verdicts), out_shardings=placement)
    state = create(shard_tree(params, where), adapted.state)

    step = make_step(
        grad,
        tx,
        method,
        verdicts,
        key=jax.random.key(setting.config["seed"], impl="rbg"),
        ctx=setting.ctx,
        largest_norm=training.clip,
    )
    mine = shard(batches, jax.process_index(), jax.process_count())
    to_device = to_devices(setting.mesh, setting.rules)
    score = split_evaluator(setting, model, "eval")

    def evaluate(state: TrainState) -> dict[str, float]:
        return score(method.eval_params(state.params, state.method)).metrics if score else {}

    keep = max(training.keep, training.average_last)
    run = Run(
        settings=training,
        steps=steps,
        step=step,
        shardings=placement,
        constants=adapted.constants,
        shapes=batch_shapes(mine, to_device),
        batches=lambda start, stop: prefetch(mine, start, stop, place=to_device),
        evaluate=evaluate,
        store=Checkpoints(workdir / "checkpoints", keep=keep),
        best=Checkpoints(workdir / "best", keep=1),
        journal=journal,
    )
    return Ready(run, state, method, adapted.axes)


def rule_verdict(training: TrainSettings, infos: Any):
    """`config.train.trainable` as a verdict; its rules are checked against every parameter."""
    rules = training.rules("trainable")
    check_rules(rules, infos, "config.train.trainable")
    return lambda info: first_match(rules, info.path, info.role)


def layer_verdict(params: Tree, verdicts: list, training: TrainSettings):
    """What must be equal for layers to be stacked besides their structure: what trains, and what decays."""
    by_layer: dict[str, list] = {}
    for name, info in describe(params).items():
        found = re.match(r"((?:.*/)?layers_\d+)/(.*)", name)
        if found:
            by_layer.setdefault(found[1], []).append((found[2], trainable(verdicts, info), decays(info, training)))
    return lambda layer: tuple(sorted(by_layer[layer]))


def tap_breaks(taps: frozenset, model: Model) -> set[int]:
    """Layers that begin a segment of their own, so that only tapped activations leave the scan.

    Where most layers are tapped, one scan that gives out all of them is smaller than many short ones.
    """
    tapped = {tap.depth for tap in taps if tap.site == "hidden"}
    return tapped if 2 * len(tapped) <= model.config.num_layers else set()


def state_shardings(state: TrainState, where: Mapping[str, Any], replicated: Any) -> TrainState:
    """Shardings of a whole state: optimizer arrays lie where the parameter of their name and shape lies."""
    shapes = {name: array.shape for name, array in arrays(state.params).items()}

    def mirror(path: tuple, leaf: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        same = names and names[-1] in where and shapes[names[-1]] == leaf.shape
        return where[names[-1]] if same else replicated

    return TrainState(
        step=replicated,
        nonfinite=replicated,
        params=with_arrays(state.params, where),
        optimizer=jax.tree_util.tree_map_with_path(mirror, state.optimizer),
        method=jax.tree.map(lambda _: replicated, state.method),
    )


def split_evaluator(setting: Setting, model: Model, split: str):
    """`params -> Score` on a split, or `None` where the config has no such data."""
    if split not in setting.splits:
        return None
    return evaluator(
        setting.task,
        model,
        setting.splits[split],
        setting.tokenizer,
        setting.data,
        batch_size=setting.training.batch_size,
        place=to_devices(setting.mesh, setting.rules),
        ctx=setting.ctx,
        dtype=setting.dtype,
    )


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


def remember(config: dict[str, Any], workdir: Path) -> None:
    """Saves the resolved config with versions and commit; refuses a directory that holds another config."""
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(k for k in before.keys() | config.keys() if before.get(k) != config.get(k))
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config (config.{', config.'.join(changed)} differ); "
                f"choose another --workdir, or delete this one"
            )
        return
    write_json(path, config)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    write_json(
        workdir / "versions.json",
        {
            "python": platform.python_version(),
            "commit": commit.stdout.strip() or None,
            "devices": [str(d) for d in jax.devices()],
            "packages": {name: version(name) for name in packages},
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def params_sha256(params: Tree) -> str:
    """sha256 over names, dtypes and bytes of every array, in order of name."""
    total = sha256()
    for name, array in sorted(arrays(params).items()):
        host = np.ascontiguousarray(jax.device_get(array))
        total.update(f"{name} {host.dtype} {host.shape}".encode())
        total.update(host.tobytes())
    return total.hexdigest()


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
