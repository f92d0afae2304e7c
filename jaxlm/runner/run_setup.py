"""What a stage works on before any method: model, parameters, tokenizer, data and mesh of a config."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Axes, Context, Operated, Tree, lookup
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.data.tokenizer import Texts, load_tokenizer
from jaxlm.evaluate.evaluator import evaluator
from jaxlm.io.carried import for_tokenizer
from jaxlm.io.model_directory import check_files
from jaxlm.io.pretrained import LM, load
from jaxlm.methods.calibration import Calibration
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.network import Network
from jaxlm.parallel import make_mesh, make_rules, pad_vocab, place, shard_tree, shardings, ways
from jaxlm.parallel.batches import to_devices
from jaxlm.runner import registry
from jaxlm.runner.calibration_data import read_calibration
from jaxlm.runner.config import plain, set_fields
from jaxlm.runner.labels import classes
from jaxlm.tasks import TASKS, Prepared, Task
from jaxlm.tasks.encode import check_fit, check_types, prepare_splits
from jaxlm.train.settings import TrainSettings


@dataclass(frozen=True)
class Setting:
    """What a stage works on, before any method: model, parameters, data, mesh.

    Attributes:
      config: plain values; data, training: its sections as objects.
      task, tokenizer, splits: what is learned, and the encoded data by split.
      model, params, axes: canonical view.
      mesh, rules: placement.
      tokenizer_source: the model's own files of the tokenizer where it is theirs; carried: what its directory says
        besides the network (`io.carried`), in the ids of the tokenizer.
      calibration: facts about the text that the surgery was calibrated on, for the result.
    """

    config: dict[str, Any]
    data: DataSettings
    training: TrainSettings
    task: Task
    tokenizer: Any
    splits: dict[str, Prepared]
    model: Network
    params: Tree
    axes: dict[str, Axes]
    mesh: jax.sharding.Mesh
    rules: Mapping[str, Any]
    tokenizer_source: Any = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None

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


def set_up(config: Any, splits: tuple[str, ...] = ("train", "eval", "test"), info=print) -> Setting:
    """Reads model and data of a config; `splits` are encoded where the config names a place for them."""
    data, training = DataSettings(**config.data), TrainSettings(**config.train)
    task = lookup(TASKS, config.task, "task")
    key = key_of(config.seed, "init")
    labels = classes(config, task, data, info)
    lm = None
    if config.model.init:
        lm = starting_model(config, task, labels, key, info)
        tokenizer = tokenizer_for(data, task, lm.tokenizer)
        model, params = Network(lm.config), lm.params
        carried = for_tokenizer(lm.carried, lm.tokenizer, tokenizer)
    else:
        tokenizer = tokenizer_for(data, task, None)
        carried = for_tokenizer({}, None, tokenizer)
        model = Network(fresh_config(config, task, labels, tokenizer))
        params = model.init(key)
    check_fit(model.config, tokenizer, data)
    mesh, axes = make_mesh(config.mesh), model.axes() if lm is None else lm.axes
    named = tuple(s for s in splits if getattr(data, s))
    prepared = prepare_splits(named, config.task, tokenizer, model.config.labels, data, info)
    check_types(model.config, prepared)
    rules = make_rules(config.sharding, axes, mesh)
    source = lm.tokenizer_source if lm is not None and tokenizer is lm.tokenizer else tokenizer
    return Setting(
        plain(config), data, training, task, tokenizer, prepared, model, params, axes, mesh, rules, source, carried
    )


def tokenizer_for(settings: DataSettings, task: Task, own: Any) -> Any:
    """The tokenizer that the config names, or trained on the training split, or the model's `own`."""
    if not settings.tokenizer:
        if own is None:
            raise ValueError(
                "no tokenizer: set config.data.tokenizer (a directory, a hub id, bpe:SIZE, wordpiece:SIZE, character), "
                "or config.model.init to a model directory that has one"
            )
        return own
    if Path(settings.tokenizer).is_dir():
        check_files(Path(settings.tokenizer))
    trained = settings.tokenizer.partition(":")[0] in ("bpe", "wordpiece", "character")
    texts = Texts(settings.source("train")) if trained else None
    return load_tokenizer(settings.tokenizer, texts, sentinels=task.sentinels)


def starting_model(config: Any, task: Task, labels: tuple[str, ...], key: jax.Array, info=print) -> LM:
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
        info(f"{init}: initialised {', '.join(lm.fresh)}")
    if lm.dropped:
        info(f"{init}: left out {', '.join(lm.dropped)}")
    if config.model.family not in (None, lm.config.family):
        raise ValueError(f"config.model.family is {config.model.family!r}, but {init} is a {lm.config.family}")
    fields = {n: v for n, v in set_fields(config.model).items() if n not in ("init", "family")}
    changed = Network(lm.config.replace(**fields))
    if changed.abstract() != Network(lm.config).abstract():
        raise ValueError(f"config.model.{', '.join(fields)} would change the parameters of {init}; leave them out")
    return dataclasses.replace(lm, config=changed.config)


def fresh_config(config: Any, task: Task, labels: tuple[str, ...], tokenizer: Any) -> Any:
    """The structure of a new model: the family's defaults, the config's fields, the task's head, the tokenizer."""
    fields = {n: v for n, v in set_fields(config.model).items() if n != "init"}
    family = fields.pop("family", "gpt2")
    special = lookup(FAMILIES, family, "family").special_tokens
    given = {"vocab_size": len(tokenizer)} | {field: getattr(tokenizer, name) for field, name in special.items()}
    return model_config(family, **{**given, "labels": labels, **task.structure, **fields})


def operate(setting: Setting) -> Setting:
    """The setting after `config.surgery`; data are encoded anew where that changed the tokenizer."""
    config = setting.config
    now = Operated(setting.model, setting.params, setting.axes, setting.tokenizer)
    read: dict[str, Any] = {}
    for entry in config["surgery"]:

        def calibration(now: Operated = now) -> Calibration:
            settings = CalibrationSettings(**config["calibration"])
            given = (setting.task, now.tokenizer, now.model.config, setting.data, config["seed"])
            found = read_calibration(settings, config["task"], *given)
            read.update(found.facts())
            return found

        offered: dict[str, Callable[[], Any]] = {
            "calibration": calibration,
            "calibrate": functools.partial(lambda function: function, calibration),
            "loss": functools.partial(getattr, setting.task, "loss"),
            "tokenizer": functools.partial(getattr, now, "tokenizer"),
            "texts": lambda: lambda split: Texts(setting.data.source(split)),
        }
        given = {"model": now.model, "params": now.params, "axes": now.axes}
        done = Operated(*registry.make(registry.SURGERY, entry, "surgery", offered, **given))
        now = done if done.tokenizer is not None else done._replace(tokenizer=now.tokenizer)
    splits, source, carried = setting.splits, setting.tokenizer_source, setting.carried
    if now.tokenizer is not setting.tokenizer:
        source, carried = now.tokenizer, for_tokenizer(carried, setting.tokenizer, now.tokenizer)
        labels = now.model.config.labels
        splits = prepare_splits(tuple(splits), config["task"], now.tokenizer, labels, setting.data)
    return dataclasses.replace(
        setting, **now._asdict(), splits=splits, tokenizer_source=source, carried=carried, calibration=read or None
    )


def on_mesh(setting: Setting, model: Network, params: Tree, axes: Mapping[str, Axes]) -> dict[str, Any]:
    """Parameters (run view) padded to a vocabulary that divides, on the devices."""
    padded = pad_vocab(params, axes, ways("vocab", setting.mesh, setting.rules))
    return shard_tree(padded, shardings(padded, axes, setting.mesh, setting.rules, model.sizes()))


def split_evaluator(setting: Setting, model: Network, split: str):
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
