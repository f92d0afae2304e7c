"""A run without its data and without memory: the same set-up on shapes, up to the step that would be compiled."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Method, MethodInit, NoData, arrays, chain, lookup, with_arrays
from jaxlm.data.settings import DataSettings
from jaxlm.io.lm import LM
from jaxlm.io.pretrained import load_abstract
from jaxlm.models.network import Network
from jaxlm.parallel import make_rules, spec_of
from jaxlm.runner import registry
from jaxlm.runner.config import plain
from jaxlm.runner.labels import class_names
from jaxlm.runner.run_setup import Operation, RunSetup, apply_surgery, fresh_config, with_head
from jaxlm.runner.sharded_step import ShardedStep, sharded_step
from jaxlm.runner.teachers import TeacherPool, loss_methods
from jaxlm.tasks import TASKS
from jaxlm.tasks.task import Column, no_labels
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import dropout_key

NOMINAL_STEPS = 1000
"""Length of the learning-rate schedule: it changes constants of the program, not its shape."""
LARGEST = 4 * 2**30
"""Bytes of parameters that surgery is tried on where shapes do not tell its result."""


class DryRun(NamedTuple):
    """What a config describes, on a mesh.

    Attributes:
      setup: the run's; start: the model with what methods add. Arrays are shapes.
      step: the training step.
      batch: ShapeDtypeStructs of one step, placed.
    """

    setup: RunSetup
    start: MethodInit
    step: ShardedStep
    batch: dict[str, jax.ShapeDtypeStruct]


def dry_run(config: Any, mesh: jax.sharding.Mesh) -> DryRun:
    """The shapes of a config on a mesh. Of the models that it starts or learns from, only headers are read.

    Raises:
      ValueError: for surgery whose shapes depend on the parameters' values or on data, a teacher's cache, or a fresh
        model whose vocabulary is not known.
    """
    setup = apply_surgery(prepare_dry_run(config, mesh), perform_on_shapes)
    teachers = TeacherPool(setup, lambda directory: without_tokenizer(load_abstract(directory)))
    method = chain([*map(registry.method, setup.config["methods"]), *loss_methods(setup.config["losses"], teachers)])
    start = init_on_shapes(method, jax.random.key(0), setup.lm)
    step = sharded_step(setup, method, start, NOMINAL_STEPS)
    return DryRun(setup, start, step, batch_shapes(setup))


def prepare_dry_run(config: Any, mesh: jax.sharding.Mesh) -> RunSetup:
    """What `prepare_run` gives, on shapes: without data, and so without a tokenizer."""
    data, training = DataSettings(**config.data), TrainSettings(**config.train)
    task = lookup(TASKS, config.task, "task")
    quiet: Callable[[str], None] = lambda text: None  # noqa: E731
    labels: tuple[str, ...] = ()
    if task.labels is not no_labels:
        labels = class_names(config, task, data, quiet, read=lambda: ()) or ("0", "1")
    if config.model.init:
        lm = without_tokenizer(with_head(config, task, labels, load_abstract, quiet))
    else:
        structure = fresh_config(config, task, labels, **known_vocabulary(config))
        lm = LM(structure, Network(structure).abstract())
    return RunSetup(
        config=plain(config),
        data=data,
        training=training,
        task=task,
        lm=lm,
        splits={},
        mesh=mesh,
        rules=make_rules(config.sharding, lm.axes, mesh),
    )


def without_tokenizer(lm: LM) -> LM:
    """The model without its tokenizer, which may not be the one that a run's data are encoded with."""
    return lm.replace(tokenizer_source=None)


def known_vocabulary(config: Any) -> dict[str, int]:
    """The size of the vocabulary as far as `config.data.tokenizer` says it."""
    if config.model.vocab_size is not None:
        return {}
    size = config.data.tokenizer.partition(":")[2]
    if not size.isdigit():
        raise ValueError(
            "the size of the vocabulary is not known without the data; set config.model.vocab_size, or "
            "config.data.tokenizer to bpe:SIZE or wordpiece:SIZE"
        )
    return {"vocab_size": int(size)}


def eval_shape(function: Operation, lm: LM) -> LM:
    """`function(lm)` on shapes."""
    result: list[LM] = []

    def run(params: Any) -> Any:
        result[:] = [function(lm.replace(params=params))]
        return result[0].params

    params = jax.eval_shape(run, lm.params)
    return result[0].replace(params=params)


def perform_on_shapes(name: str, operation: Operation, lm: LM) -> LM:
    """One entry of `config.surgery` on shapes.

    Surgery that looks at values (which heads are the weakest) is tried on two models of these shapes, one of zeros and
    one drawn at random; where both come out alike, the values do not matter.

    Raises:
      NoData: where surgery reads data.
      ValueError: where the values do matter, or are too many to make up.
    """
    what = f"config.surgery: {name}"
    try:
        return eval_shape(operation, lm)
    except NoData as error:
        raise NoData(f"{error}; shapes have no data, so leave it out here") from None
    except jax.errors.JAXTypeError:  # it looks at values
        pass
    shapes = arrays(lm.params)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in shapes.values())
    if size > LARGEST:
        raise ValueError(f"{what} looks at the parameters' values, and {size / 1e9:.1f} GB are too many to make up")
    random, outcomes = np.random.default_rng(0), []
    for make in (np.zeros, lambda shape: random.normal(size=shape)):
        made_up = {path: jnp.asarray(make(a.shape), a.dtype) for path, a in shapes.items()}
        outcomes.append(operation(lm.replace(params=with_arrays(lm.params, made_up))).shapes())
    first, second = outcomes
    if (first.config, first.params, first.axes) != (second.config, second.params, second.axes):
        raise ValueError(f"{what}: what is left depends on the parameters' values; leave it out here")
    return first


def init_on_shapes(method: Method, key: jax.Array, lm: LM) -> MethodInit:
    """`method.init` on shapes.

    Constants that are shapes already (a teacher's, with their places on a mesh) stay what they are.
    """
    traced: list[MethodInit] = []

    def init(lm: LM) -> LM:
        traced[:] = [method.init(key, lm)]
        return cast(LM, traced[0].lm)

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        is_shape = isinstance(array, jax.ShapeDtypeStruct)
        return array if is_shape else jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array))

    lm = eval_shape(init, lm)
    return MethodInit(lm, jax.tree.map(shape, traced[0].constants), jax.tree.map(shape, traced[0].state))


def batch_shapes(setup: RunSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch that a task makes: `[rows, (group,) length]`, or `[rows]` for what stands once a row."""
    rows, length = setup.training.batch_size, setup.data.max_length
    texts = (rows, setup.task.group) if setup.task.group > 1 else (rows,)

    def shape(column: Column) -> jax.ShapeDtypeStruct:
        dims = (*texts, length) if column.per_token else (rows,)
        names = ("batch", *(None,) * (len(dims) - 1))
        sharding = jax.sharding.NamedSharding(setup.mesh, spec_of(names, dims, setup.rules, setup.mesh))
        return jax.ShapeDtypeStruct(dims, column.dtype, sharding=sharding)

    return {name: shape(column) for name, column in setup.task.columns.items()}


def lower_step(config: Any, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The training step of a config, lowered for a mesh of devices that need not be here."""
    dry = dry_run(config, mesh)
    placement = dry.step.placement
    state = jax.eval_shape(dry.step.create, dropout_key(0), dry.step.params, dry.start.state)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placement)
    step = jax.jit(dry.step.step, donate_argnums=0, out_shardings=(placement, None))
    return step.lower(placed, dry.start.constants, dry.batch)
