"""The default config, derived from the functions that read it, and its way back to plain values."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxlm.core import nearest
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.evaluate.settings import ReportSettings, SearchSettings
from jaxlm.models.config import ModelConfig
from jaxlm.parallel import DEFAULT_MESH
from jaxlm.train.settings import TrainSettings

NOT_SET_BY_HAND = {"head", "labels", "regression", "next_sentence"}
"""Fields of ModelConfig that the task decides."""


class Config(ConfigDict):
    """A ConfigDict that names the nearest field when a recipe sets one that does not exist, not all there are."""

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_locked and key not in self:
            raise KeyError(f"the config has no field {key!r} here; {nearest(key, self.keys())}")
        super().__setitem__(key, value)


@dataclass(frozen=True)
class RunSettings:
    """What a run does, in the order in which it does it.

    Attributes:
      seed: of every draw: initial parameters, order of the data, dropout.
      task: what is learned, see `jaxlm.tasks`.
      surgery: what changes the model before training, a tuple of `{"name": …, …}`.
      methods: what acts while training goes on, a tuple of `{"name": …, …}`.
      losses: what is added to the loss of the task, a tuple of `{"name": …, …}`.
      bake: fold what methods did into the model at the end.
      layout: of the model directory: `transformers` wherever that library can express the model, `native` (zeros take
        no room), `padded` (a copy with zeros for transformers beside a model that it cannot express), or `adapter`
        (only what the run added to `model.init`).
      mesh_axes: names of the axes of the mesh, slowest to fastest; their sizes are in `mesh`, and `sharding` maps axis
        names of the model to them.
      stages: of a pipeline: a tuple of `{"name": …, "description": …, …}`, whose other entries are sections of the
        stage's config.
    """

    seed: int = 0
    task: str = "causal"
    surgery: tuple = ()
    methods: tuple = ()
    losses: tuple = ()
    bake: bool = True
    layout: str = "transformers"
    mesh_axes: tuple = tuple(DEFAULT_MESH)
    stages: tuple = ()


@dataclass(frozen=True)
class ModelSettings:
    """The model to begin with: what is read, and every field of ModelConfig, `None` where `init` or the family decides.

    Attributes:
      init: a model directory, a hub id, or "" for a fresh model.
    """

    init: str = ""


@dataclass(frozen=True)
class MeshSettings:
    """How many devices lie along each axis of the mesh; -1 for all that the other axes leave.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts of the batch and of every parameter, which is gathered a layer at a time.
      tensor: parts of every layer's heads, units and vocabulary.
    """

    data: int = DEFAULT_MESH["data"]
    fsdp: int = DEFAULT_MESH["fsdp"]
    tensor: int = DEFAULT_MESH["tensor"]


def default_config() -> ConfigDict:
    """What a recipe starts from. A field that a recipe or the command line names and that is not here is an error."""
    sections = {
        "model": _defaults(ModelSettings) | {"family": config_dict.placeholder(str)} | _placeholders(ModelConfig),
        "data": _defaults(DataSettings),
        "train": _defaults(TrainSettings),
        "calibration": _defaults(CalibrationSettings),
        "mesh": _defaults(MeshSettings),
        "sharding": {},
        "report": _defaults(ReportSettings),
        "search": _defaults(SearchSettings),
    }
    config = Config(_defaults(RunSettings))
    for name, section in sections.items():
        config[name] = Config(section)
    config.lock()
    config.mesh.unlock()  # its keys are the names in mesh_axes
    config.sharding.unlock()  # its keys are the axis names of the model
    return config


def mesh_shape(config: ConfigDict) -> dict[str, int]:
    """Sizes of the mesh axes of a config, slowest to fastest; an axis without a size has 1.

    The sizes alone would not tell the order: a ConfigDict sorts its keys.

    Raises:
      ValueError: for the size of an axis that `config.mesh_axes` does not name, and one that it names twice.
    """
    names = tuple(config.mesh_axes)
    for name in config.mesh:
        if name not in names:
            raise ValueError(f"config.mesh: unknown mesh axis {name!r}; {nearest(name, names)} (config.mesh_axes)")
    if len(set(names)) < len(names):
        raise ValueError(f"config.mesh_axes names an axis twice: {', '.join(names)}")
    return {name: config.mesh.get(name, 1) for name in names}


def _defaults(cls: type) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: config_dict.placeholder(object) if value is None else value for name, value in fields.items()}


def _placeholders(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in NOT_SET_BY_HAND | {"family"}]
    return {name: config_dict.placeholder(_simple(hints[name])) for name in names}


def _simple(hint: Any) -> type:
    """The plain type of a field, `object` where several are possible."""
    options = [t for t in typing.get_args(hint) if t is not types.NoneType] if typing.get_args(hint) else [hint]
    return options[0] if len(options) == 1 and options[0] in (int, float, str, bool) else object


def overlay(config: ConfigDict, values: Mapping[str, Any], section: str) -> None:
    """Sets fields of a config, section by section; `None` leaves a field as it is.

    Raises:
      ValueError: for a field that the config does not have, naming the nearest.
    """
    for key, value in values.items():
        if key not in config and not section.endswith((".mesh", ".sharding")):  # keys are names of axes
            raise ValueError(f"{section} has no field {key!r}; {nearest(key, config.keys())}")
        if isinstance(value, Mapping) and key in config and isinstance(config[key], ConfigDict):
            overlay(config[key], value, f"{section}.{key}")
        elif value is not None:
            with config.unlocked():
                config[key] = tuple(value) if isinstance(value, list) else value


def plain(config: Any) -> Any:
    """Nested dicts, lists and scalars: what JSON can hold."""
    if isinstance(config, ConfigDict):
        return {key: plain(config[key]) for key in sorted(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [plain(value) for value in config]
    return config


def set_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section that are not `None`."""
    return {key: value for key, value in section.items() if value is not None}
