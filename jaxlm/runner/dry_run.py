"""A config without its data and without memory: the model's shapes, its methods and the batch that a step would get."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Adapted, Axes, Context, Method, Tree, arrays, chain, flatten, lookup, unflatten, with_arrays
from jaxlm.data.settings import DataSettings
from jaxlm.io.model_directory import open_model
from jaxlm.io.pretrained import find, retarget
from jaxlm.methods.distill.teacher import Lesson, Teacher
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.parallel import make_rules, pad_vocab, place, shardings, spec_of, ways
from jaxlm.runner import registry
from jaxlm.runner.config import plain, set_fields
from jaxlm.runner.distillation import distillation, has_teachers
from jaxlm.runner.sharded_step import ShardedStep, abstract_adapted, blueprint, tap_breaks
from jaxlm.tasks import TASKS, Task
from jaxlm.tasks.task import Column
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import dropout_key

NOMINAL_STEPS = 1000
"""Length of the learning-rate schedule: it changes constants of the program, not its shape."""


class DryRun(NamedTuple):
    """What a config describes, on a mesh.

    Attributes:
      model: structure; adapted: its leaves with those that methods add, as shapes.
      blueprint: the training step.
      rules: from axis names to mesh axes.
      batch: ShapeDtypeStructs of one step, placed.
    """

    model: Network
    adapted: Adapted
    blueprint: ShardedStep
    rules: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]


def outline(config: Any, mesh: jax.sharding.Mesh) -> DryRun:
    """The shapes of a config on a mesh. Of the models that it starts or learns from, only shapes are read.

    Raises:
      ValueError: for surgery whose shapes depend on the parameters' values or on calibration data, or a fresh model
        whose vocabulary is not known.
    """
    values = plain(config)
    task = lookup(TASKS, config.task, "task")
    training, data = TrainSettings(**config.train), DataSettings(**config.data)
    model, params, axes = start(config, task)
    for entry in values["surgery"]:
        model, params, axes = operated(entry, model, params, axes)
    rules = make_rules(config.sharding, axes, mesh)
    taught = [lesson(entry, model, mesh, rules, training) for entry in values["losses"]]
    method = chain([*(registry.method(entry) for entry in values["methods"]), *taught])
    adapted = abstract_adapted(method, jax.random.key(0), model, params, axes)
    drawn = blueprint(model, method, adapted, task, training, mesh, rules, NOMINAL_STEPS)
    batch = batch_shapes(task, training.batch_size, data.max_length, mesh, rules)
    return DryRun(model, adapted, drawn, rules, batch)


def start(config: Any, task: Task) -> tuple[Network, Tree, dict[str, Axes]]:
    """The model that a config starts from, as shapes: a stored one with its Weights and sites, or a fresh one."""
    model = Network(structure(config, task))
    params, axes = flatten(model.abstract()), model.axes()
    if config.model.init:
        stored = open_model(find(config.model.init), task.structure["head"])
        shapes = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in arrays(stored.params).items()}
        params |= {
            path: leaf
            for path, leaf in flatten(with_arrays(stored.params, shapes)).items()
            if path in stored.axes or (path in params and tuple(leaf.shape) == params[path].shape)
        }
        axes |= stored.axes
    return model, unflatten(params), axes


def lesson(
    entry: Mapping[str, Any],
    student: Network,
    mesh: jax.sharding.Mesh,
    rules: Mapping[str, Any],
    training: TrainSettings,
) -> tuple[str, Method]:
    """An entry of `config.losses` as a method; of its teachers only the directories' shapes are read.

    Raises:
      ValueError: for a cached teacher, whose answers are columns of the data, or one that judges the student's texts.
    """
    what, known = f"config.losses: {entry.get('name', '')}", {}

    def teacher(directory: str | None, cache: Mapping[str, Any] | None, temperature: float) -> Teacher:
        if cache is not None or directory is None:
            raise ValueError(f"{what}: a teacher's cache is read with the data; leave the cache out here")
        stored = open_model(find(directory))
        model = Network(stored.config)
        shapes = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in arrays(stored.params).items()}
        params = with_arrays(stored.params, shapes)
        known[id(params)] = model, {**model.axes(), **stored.axes}
        ctx, dtype = Context(place=place(mesh, rules)), jnp.dtype(training.dtype)
        forward = lambda params, batch, taps: model.forward(params, batch, ctx=ctx, taps=taps, dtype=dtype)  # noqa: E731
        own, other = student.config.vocab_size, stored.config.vocab_size
        shared = min(own, other) if own != other and not stored.config.num_labels else None
        return Teacher(forward, params, stored.config.num_layers, stored.config.hidden_size, shared)

    def placed(lesson: Lesson) -> Lesson:
        assert isinstance(lesson.teacher, Teacher)
        model, axes = known[id(lesson.teacher.params)]
        breaks = tap_breaks(lesson.plan(student.config.num_layers).taps(side=1), model)
        view = lambda tree: pad_vocab(model.run_view(tree, breaks=breaks), axes, ways("vocab", mesh, rules))  # noqa: E731
        params = jax.eval_shape(view, lesson.teacher.params)
        where = shardings(params, axes, mesh, rules, model.sizes())
        values = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where[n]) for n, a in arrays(params).items()}
        return dataclasses.replace(lesson, teacher=lesson.teacher._replace(params=with_arrays(params, values)))

    def writing(**options: Any) -> Any:
        raise ValueError(f"{what}: what a student writes is not known from shapes; leave on_policy out here")

    if has_teachers(entry):
        return entry["name"], distillation(entry, teacher, placed, writing)
    return entry["name"], registry.make(registry.LOSSES, entry, "losses")


READ = {"calibration", "calibrate", "loss", "tokenizer", "texts"}
"""What surgery is given beside the model, if it asks for it."""
LARGEST = 4 * 2**30
"""Bytes of parameters that surgery is tried on where shapes do not tell its result."""


def operated(
    entry: Mapping[str, Any], model: Network, params: Tree, axes: Mapping[str, Axes]
) -> tuple[Network, Tree, dict[str, Axes]]:
    """A model after one entry of `config.surgery`, as shapes.

    Surgery that looks at values (which heads are the weakest) is tried on two models of these shapes, one of zeros and
    one drawn at random; where both come out alike, the values do not matter.

    Raises:
      ValueError: where they do, or where surgery reads calibration data.
    """
    what = f"config.surgery: {entry['name']}" if "name" in entry else "config.surgery"
    found: dict[str, Any] = {}

    def run(values: Tree) -> Tree:
        given = {"model": model, "params": values, "axes": dict(axes)}
        found["model"], result, found["axes"], *_ = registry.make(registry.SURGERY, entry, "surgery", **given)
        return result

    function: Any = registry.SURGERY.get(entry.get("name", ""))
    options = inspect.signature(function).parameters.values() if function is not None else ()
    if data := {o.name for o in options if o.default is o.empty} & READ:
        raise ValueError(f"{what} reads data ({', '.join(sorted(data))}), and shapes have none; leave it out here")
    try:
        shapes = jax.eval_shape(run, params)
        return found["model"], shapes, found["axes"]
    except jax.errors.JAXTypeError:  # it looks at values
        pass
    flat = arrays(params)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in flat.values())
    if size > LARGEST:
        raise ValueError(f"{what} looks at the parameters' values, and {size / 1e9:.1f} GB are too many to make up")
    draw, outcomes = np.random.default_rng(0), []
    for make in (np.zeros, lambda shape: draw.normal(size=shape)):
        result = run(with_arrays(params, {name: jnp.asarray(make(a.shape), a.dtype) for name, a in flat.items()}))
        outcomes.append((found["model"], jax.eval_shape(lambda tree: tree, result), found["axes"]))
    if outcomes[0] != outcomes[1]:
        raise ValueError(f"{what}: what is left depends on the parameters' values; leave it out here")
    return outcomes[0]


def structure(config: Any, task: Any) -> Any:
    """The ModelConfig: of the stored model, or of a fresh one with the vocabulary that the config names."""
    head = task.structure["head"]
    labels = ("0", "1") if head in ("sequence", "token") and not task.structure.get("regression") else None
    if config.model.init:
        stored = open_model(find(config.model.init), head).config
        own = stored.head == head and bool(stored.labels)
        return retarget(stored, head, None if own else labels, task.structure.get("regression", False))
    fields = {n: v for n, v in set_fields(config.model).items() if n != "init"}
    size = config.data.tokenizer.partition(":")[2]
    if "vocab_size" not in fields:
        if not size.isdigit():
            raise ValueError(
                "the size of the vocabulary is not known without the data; set config.model.vocab_size, or "
                "config.data.tokenizer to bpe:SIZE or wordpiece:SIZE"
            )
        fields["vocab_size"] = int(size)
    return model_config(fields.pop("family", "gpt2"), **{"labels": labels or (), **task.structure, **fields})


def batch_shapes(
    task: Task, rows: int, length: int, mesh: jax.sharding.Mesh, rules: dict[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch that a task makes: `[rows, length]`, or `[rows]` for what stands once a row."""

    def shape(column: Column) -> jax.ShapeDtypeStruct:
        dims, names = ((rows, length), ("batch", None)) if column.per_token else ((rows,), ("batch",))
        sharding = jax.sharding.NamedSharding(mesh, spec_of(names, dims, rules, mesh))
        return jax.ShapeDtypeStruct(dims, column.dtype, sharding=sharding)

    return {name: shape(column) for name, column in task.columns.items()}


def lower_step(config: Any, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The training step of a config, lowered for a mesh of devices that need not be here."""
    found = outline(config, mesh)
    step, placement = found.blueprint.step, found.blueprint.placement
    state = jax.eval_shape(found.blueprint.create, dropout_key(0), found.blueprint.params, found.adapted.state)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placement)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    return compiled.lower(placed, found.adapted.constants, found.batch)
