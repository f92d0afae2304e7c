"""A config without its data and without memory: the model's shapes, its methods and the batch that a step would get."""

from typing import Any, NamedTuple

import jax

from jaxlm.build import registry
from jaxlm.build.blueprint import Blueprint, abstract_adapted, blueprint
from jaxlm.build.config import plain, set_fields
from jaxlm.core import Adapted, chain, lookup
from jaxlm.data.settings import DataSettings
from jaxlm.io.directory import open_model
from jaxlm.io.model import find, retarget
from jaxlm.models import model_config
from jaxlm.models.model import Model
from jaxlm.parallel import make_rules, spec_of
from jaxlm.tasks import TASKS, Task
from jaxlm.tasks.task import Column
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import dropout_key

NOMINAL_STEPS = 1000
"""Length of the learning-rate schedule: it changes constants of the program, not its shape."""


class Outline(NamedTuple):
    """What a config describes, on a mesh.

    Attributes:
      model: structure; adapted: its leaves with those that methods add, as shapes.
      blueprint: the training step.
      rules: from axis names to mesh axes.
      batch: ShapeDtypeStructs of one step, placed.
    """

    model: Model
    adapted: Adapted
    blueprint: Blueprint
    rules: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]


def outline(config: Any, mesh: jax.sharding.Mesh) -> Outline:
    """The shapes of a config on a mesh. Surgery and teachers need parameters and are refused.

    Raises:
      ValueError: for a config with surgery or losses, or a fresh model whose vocabulary is not known.
    """
    values = plain(config)
    for section in ("surgery", "losses"):
        if values[section]:
            raise ValueError(f"config.{section} needs parameters; shapes alone tell nothing of it. Leave it out here")
    task = lookup(TASKS, config.task, "task")
    training, data = TrainSettings(**config.train), DataSettings(**config.data)
    model = Model(structure(config, task))
    axes = model.axes()
    rules = make_rules(config.sharding, axes, mesh)
    method = chain([registry.method(entry) for entry in values["methods"]])
    adapted = abstract_adapted(method, jax.random.key(0), model, axes)
    drawn = blueprint(model, method, adapted, task, training, mesh, rules, NOMINAL_STEPS)
    batch = batch_shapes(task, training.batch_size, data.max_length, mesh, rules)
    return Outline(model, adapted, drawn, rules, batch)


def structure(config: Any, task: Any) -> Any:
    """The ModelConfig: of the stored model, or of a fresh one with the vocabulary that the config names."""
    head = task.structure["head"]
    labels = ("0", "1") if head in ("sequence", "token") and not task.structure.get("regression") else None
    if config.model.init:
        stored = open_model(find(config.model.init), head)
        return retarget(stored.config, head, labels, task.structure.get("regression", False))
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
    return jax.jit(step, donate_argnums=0, out_shardings=(placement, None)).lower(placed, {}, found.batch)
