"""What a run works on before any method: the model of a config, its data and its mesh, and surgery on that model."""

import dataclasses
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import NO_DATA, Calibration, Context, SurgeryContext, lookup
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.data.tokenizer import Texts, load_tokenizer
from jaxlm.evaluate.evaluator import evaluator
from jaxlm.io.lm import LM
from jaxlm.io.model_directory import check_files
from jaxlm.io.pretrained import load
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.config import ModelConfig
from jaxlm.models.network import Network
from jaxlm.parallel import make_mesh, make_rules, num_shards, pad_vocab, place, shard_tree, shardings
from jaxlm.parallel.batches import to_devices
from jaxlm.runner import registry
from jaxlm.runner.calibration_data import read_calibration
from jaxlm.runner.config import mesh_shape, plain, set_fields
from jaxlm.runner.labels import class_names
from jaxlm.tasks import TASKS, Prepared, Task
from jaxlm.tasks.encode import check_fit, check_types, prepare_splits
from jaxlm.tasks.task import no_labels
from jaxlm.train.settings import TrainSettings


@dataclass(frozen=True)
class RunSetup:
    """What a run works on: one model, its data, one mesh. In a dry run arrays are shapes, and there are no data.

    Attributes:
      config: plain values; data, training: its sections as objects.
      task: what is learned.
      lm: the model, tokenizer included.
      splits: the encoded data by split.
      mesh, rules: placement.
      calibration: facts about the text that the surgery was calibrated on, for the result.
    """

    config: dict[str, Any]
    data: DataSettings
    training: TrainSettings
    task: Task
    lm: LM
    splits: Mapping[str, Prepared]
    mesh: jax.sharding.Mesh
    rules: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None

    @property
    def ctx(self) -> Context:
        """The placement of activations."""
        return Context(place=place(self.mesh, self.rules))

    @property
    def dtype(self) -> Any:
        """Of activations and products."""
        return jnp.dtype(self.training.dtype)

    def key(self, name: str) -> jax.Array:
        """The key of one use of randomness."""
        return key_of(self.config["seed"], name)


def key_of(seed: int, name: str) -> jax.Array:
    """The key of one use of randomness in a run."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def prepare_run(
    config: Any, splits: tuple[str, ...] = ("train", "eval", "test"), info: Callable[[str], None] = print
) -> RunSetup:
    """Reads model and data of a config; `splits` are encoded where the config names a place for them."""
    data, training = DataSettings(**config.data), TrainSettings(**config.train)
    task = lookup(TASKS, config.task, "task")
    labels = () if task.labels is no_labels else class_names(config, task, data, info)
    lm = starting_model(config, task, data, labels, info)
    check_fit(lm.config, lm.tokenizer, data)
    mesh = make_mesh(mesh_shape(config))
    named = tuple(split for split in splits if getattr(data, split))
    prepared = prepare_splits(named, config.task, lm.tokenizer, lm.config.labels, data, info)
    check_types(lm.config, prepared)
    return RunSetup(
        config=plain(config),
        data=data,
        training=training,
        task=task,
        lm=lm,
        splits=prepared,
        mesh=mesh,
        rules=make_rules(config.sharding, lm.axes, mesh),
    )


# The model ------------------------------------------------------------------------------------------------------------


def starting_model(
    config: Any, task: Task, data: DataSettings, labels: tuple[str, ...], info: Callable[[str], None]
) -> LM:
    """The model that a run starts from, with the tokenizer that its data are encoded with."""
    key = key_of(config.seed, "init")
    if config.model.init:
        lm = with_head(config, task, labels, load, info, key=key)
        return lm.with_tokenizer(choose_tokenizer(data, task, lm.tokenizer))
    tokenizer = choose_tokenizer(data, task, None)
    special = special_ids(config, tokenizer)
    structure = fresh_config(config, task, labels, vocab_size=len(tokenizer), **special)
    return LM.initialize(structure, key, tokenizer).with_tokenizer(tokenizer)


def with_head(
    config: Any,
    task: Task,
    labels: tuple[str, ...],
    load: Callable[..., LM],
    info: Callable[[str], None],
    **options: Any,
) -> LM:
    """The model of `config.model.init` with the task's head; leaves that it lacks are initialised and named.

    Args:
      load: `load`, or `load_abstract`; options: for it.

    Raises:
      ValueError: for a field of `config.model` that would change the stored parameters' shapes.
    """
    init, structure = config.model.init, task.structure
    regression = structure.get("regression", False)
    lm = load(init, head=structure["head"], labels=labels or None, regression=regression, **options)
    if structure.get("next_sentence") and not lm.config.next_sentence:
        raise ValueError(f"{init} has no next-sentence head; train it with config.task = 'masked'")
    if lm.fresh:
        info(f"{init}: initialised {', '.join(lm.fresh)}")
    if lm.dropped:
        info(f"{init}: left out {', '.join(lm.dropped)}")
    if config.model.family not in (None, lm.config.family):
        raise ValueError(f"config.model.family is {config.model.family!r}, but {init} is a {lm.config.family}")
    fields = {name: value for name, value in set_fields(config.model).items() if name not in ("init", "family")}
    changed = lm.config.replace(**fields)
    if Network(changed).abstract() != lm.network.abstract():
        raise ValueError(f"config.model.{', '.join(fields)} would change the parameters of {init}; leave them out")
    return lm.replace(config=changed)


def choose_tokenizer(settings: DataSettings, task: Task, stored: Any) -> Any:
    """The tokenizer that the config names, or trained on the training split, or the model's `stored` one."""
    if not settings.tokenizer:
        if stored is None:
            raise ValueError(
                "no tokenizer: set config.data.tokenizer (a directory, a hub id, bpe:SIZE, wordpiece:SIZE, character), "
                "or config.model.init to a model directory that has one"
            )
        return stored
    if Path(settings.tokenizer).is_dir():
        check_files(Path(settings.tokenizer))
    trained = settings.tokenizer.partition(":")[0] in ("bpe", "wordpiece", "character")
    texts = Texts(settings.source("train")) if trained else None
    return load_tokenizer(settings.tokenizer, texts, sentinels=task.sentinels)


def special_ids(config: Any, tokenizer: Any) -> dict[str, int | None]:
    """The ids of the special tokens that the family's structure names."""
    special = lookup(FAMILIES, config.model.family or "gpt2", "family").special_tokens
    return {field: getattr(tokenizer, name) for field, name in special.items()}


def fresh_config(config: Any, task: Task, labels: tuple[str, ...], **given: Any) -> ModelConfig:
    """The structure of a new model: the family's defaults, what the data give, the task's head, the config's fields."""
    fields = {name: value for name, value in set_fields(config.model).items() if name != "init"}
    return model_config(fields.pop("family", "gpt2"), **{**given, "labels": labels, **task.structure, **fields})


# Surgery --------------------------------------------------------------------------------------------------------------

Operation = Callable[[LM], LM]


def perform(name: str, operation: Operation, lm: LM) -> LM:
    """One entry of `config.surgery` on a model with parameters."""
    return operation(lm)


def apply_surgery(setup: RunSetup, perform: Callable[[str, Operation, LM], LM] = perform) -> RunSetup:
    """The setup after `config.surgery`; data are encoded anew where that changed the tokenizer.

    Args:
      perform: `(name of the entry, operation, lm) -> lm`; a dry run has shapes to perform it on.
    """
    lm, calibrated_on = setup.lm, dict[str, Any]()
    for entry in setup.config["surgery"]:
        context = surgery_context(setup, calibrated_on)
        lm = perform(entry.get("name", ""), partial(registry.operate, entry, context=context), lm)
    splits = setup.splits
    if splits and lm.tokenizer is not setup.lm.tokenizer:
        splits = prepare_splits(tuple(splits), setup.config["task"], lm.tokenizer, lm.config.labels, setup.data)
    return dataclasses.replace(setup, lm=lm, splits=splits, calibration=calibrated_on or None)


def surgery_context(setup: RunSetup, calibrated_on: dict[str, Any]) -> SurgeryContext:
    """What surgery may read; facts about calibration data that are read go into `calibrated_on`.

    A dry run has no tokenizer, and so no data.
    """
    if setup.lm.tokenizer is None:
        return NO_DATA

    def read(lm: Any) -> Calibration:
        calibration = read_calibration(
            CalibrationSettings(**setup.config["calibration"]),
            setup.config["task"],
            setup.task,
            lm.tokenizer,
            lm.config,
            setup.data,
            setup.config["seed"],
        )
        calibrated_on.update(calibration.facts())
        return calibration

    return SurgeryContext(read, setup.task.loss, lambda split: Texts(setup.data.source(split)))


# On the devices -------------------------------------------------------------------------------------------------------


def on_mesh(setup: RunSetup, lm: LM, breaks: Collection[int] = ()) -> dict[str, Any]:
    """The parameters of a model on the devices: run view, the vocabulary padded to a multiple that divides.

    Args:
      breaks: layers that begin a segment of their own, see `Network.run_view`.
    """
    params = lm.network.run_view(lm.params, breaks=breaks)
    params = pad_vocab(params, lm.axes, num_shards("vocab", setup.mesh, setup.rules))
    return shard_tree(params, shardings(params, lm.axes, setup.mesh, setup.rules, lm.network.sizes()))


def split_evaluator(setup: RunSetup, network: Network, split: str):
    """`params -> Score` on a split, or `None` where the config has no such data."""
    if split not in setup.splits:
        return None
    return evaluator(
        setup.task,
        network,
        setup.splits[split],
        setup.lm.tokenizer,
        setup.data,
        batch_size=setup.training.batch_size,
        to_devices=to_devices(setup.mesh, setup.rules),
        ctx=setup.ctx,
        dtype=setup.dtype,
    )
