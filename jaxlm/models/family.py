"""Family: what distinguishes a model family, as data and small pure functions; all families share one network."""

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxlm.core import checked, lookup, nearest
from jaxlm.models.config import MAX_SIZE, ModelConfig, check_field
from jaxlm.models.heads import HEAD_FIELDS, HEADS, Head


class NotExpressible(ValueError):
    """transformers has no configuration for this model; the message names the field that it lacks."""


class Row(NamedTuple):
    """One tensor of a transformers checkpoint, and the arrays it holds.

    The arrays are concatenated along their last dimension (GPT-2 stores query, key and value in one matrix), and the
    result is transposed where torch stores `[out, in]`; so every row is invertible by construction.

    Attributes:
      hf: name in transformers; `{i}` stands for the number of a layer.
      paths: paths of the arrays.
      transpose: the stored tensor is the transpose.
      copy: a second copy of a tensor, which transformers expects under this name; it is written, and read only when
        the first is missing.
    """

    hf: str
    paths: tuple[str, ...]
    transpose: bool = False
    copy: bool = False

    def at(self, number: int) -> "Row":
        """The row of one layer."""
        paths = tuple(path.replace("{i}", str(number)) for path in self.paths)
        return self._replace(hf=self.hf.replace("{i}", str(number)), paths=paths)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The stored tensor.

        >>> Row("w", ("a", "b")).join([np.zeros((2, 1)), np.zeros((2, 3))]).shape
        (2, 4)
        """
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return whole.T if self.transpose else whole

    def part(self, whole: np.ndarray, index: int, widths: list[int]) -> np.ndarray:
        """Array number `index` of the stored tensor, given the last dimensions of all; a view.

        >>> Row("w", ("a", "b")).part(np.zeros((2, 4)), 1, [1, 3]).shape
        (2, 3)
        """
        start = sum(widths[:index])
        return (whole.T if self.transpose else whole)[..., start : start + widths[index]]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the stored tensor, given those of its arrays."""
        whole = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return whole[::-1] if self.transpose else whole


class Rows(Protocol):
    """The tensors of a part of a network as a transformers checkpoint names them."""

    def __call__(self, config: ModelConfig, /) -> Sequence[Row]:
        """Rows of all tensors that a config may have; the reader skips a row whose arrays the config lacks."""
        ...


class Family(NamedTuple):
    """A model family.

    Attributes:
      name: its name, which is its `model_type` in transformers.
      defaults: fields of a new ModelConfig, small enough for a laptop.
      architectures: class in transformers -> the fields of ModelConfig that it implies, `head` among them.
      base: prefix of the tensors below the head in transformers, "" for none.
      from_hf: transformers' config.json -> fields of ModelConfig, without those of the architecture.
      to_hf: the inverse; raises NotExpressible.
      body: rows of the tensors below the head.
      heads: rows of the tensors of each head that transformers' classes of the family have.
      aliases: names under which transformers stores a tensor a second time -> its first name.
      ignored: regex of tensors that are not parameters (position ids and masks of old releases).
      derived: fields of a new ModelConfig that are computed from others when they are not set.
      special_tokens: fields of a new ModelConfig that are ids of the tokenizer -> its name for them.
    """

    name: str
    defaults: Mapping[str, Any]
    architectures: Mapping[str, Mapping[str, Any]]
    base: str
    from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    body: Rows
    heads: Mapping[str, Rows]
    aliases: Mapping[str, str] = {}
    ignored: str = r".*position_ids"
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {}
    special_tokens: Mapping[str, str] = {"pad_token_id": "pad_token_id"}

    def names(self, config: ModelConfig) -> list[Row]:
        """Rows of all tensors that a config may have; of the body alone for a head that transformers has not."""
        return [*self.body(config), *self.heads.get(config.head, no_rows)(config)]


# Rows ---------------------------------------------------------------------------------------------------------------


def no_rows(config: ModelConfig) -> Sequence[Row]:
    """Of a head without tensors."""
    return ()


def named(hf: str, path: str) -> Rows:
    """Of a head that is one torch Linear called `hf`."""
    return lambda config: tuple(linear(hf, path))


def linear(hf: str, path: str) -> Iterator[Row]:
    """torch's Linear: `weight [out, in]` and, where the model has one, `bias`."""
    yield Row(f"{hf}.weight", (f"{path}/kernel",), transpose=True)
    yield Row(f"{hf}.bias", (f"{path}/bias",))


def table(hf: str, path: str) -> Row:
    """An embedding."""
    return Row(f"{hf}.weight", (f"{path}/embedding",))


def norm(hf: str, path: str) -> Iterator[Row]:
    """LayerNorm, or RMSNorm where the model has no bias."""
    yield Row(f"{hf}.weight", (f"{path}/scale",))
    yield Row(f"{hf}.bias", (f"{path}/bias",))


# Configurations -----------------------------------------------------------------------------------------------------

Keys = Mapping[str, tuple[str, Any]]
"""Field of ModelConfig -> (key in transformers, transformers' default)."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Activation in transformers -> in jaxlm. The first of several names is the one written."""


def read(hf: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """Fields of ModelConfig from a transformers config; `null` only where a field, or its default, may be `None`.

    Raises:
      ValueError: for a value of another kind or out of bounds, by its key.
    """
    fields: dict[str, Any] = {}
    for field, (key, default) in keys.items():
        value = hf.get(key, default)
        if isinstance(value, list):
            raise ValueError(f"{key}: expected one value for all layers, found {reprlib.repr(value)}")
        if field == "pad_token_id" and value == -1:  # old conversions of Llama: no padding token
            value = None
        fields[field] = None if value is default is None else check_field(field, value, key)
    if "activation" in fields:
        fields["activation"] = lookup(ACTIVATIONS, fields["activation"], "activation")
    return fields


def write(config: ModelConfig, keys: Keys) -> dict[str, Any]:
    """The inverse of `read`; a size must be the same in all layers."""
    return {key: _plain(config, field) for field, (key, _) in keys.items()}


def _plain(config: ModelConfig, field: str) -> Any:
    value = getattr(config, field)
    if field == "activation":
        names = [hf for hf, activation in ACTIVATIONS.items() if activation == value]
        if not names:
            raise NotExpressible(f"transformers has no activation {value!r}")
        return names[0]
    if isinstance(value, tuple):
        if len(set(value)) > 1:
            raise NotExpressible(f"transformers needs the same {field} in all layers, these differ: {value}")
        return value[0]
    return value


def refuse(hf: Mapping[str, Any], family: str, **supported: Any) -> None:
    """Raises ValueError for a key whose value is not the supported one; the message names it."""
    for key, value in supported.items():
        if key in hf and hf[key] != value:
            raise ValueError(f"{family} with {key}={reprlib.repr(hf[key])} is not supported (only {value!r})")


def read_labels(hf: Mapping[str, Any], head: str) -> dict[str, Any]:
    """`labels` and `regression` of a labelled head; a single label of a row means regression, as in transformers.

    Names that are numbers are read as they are written. `label2id` is not read, since transformers does not compute
    with it, and in many public files it contradicts `id2label`.
    """
    chosen: Head = lookup(HEADS, head, "head")
    if not chosen.labelled:
        return {}
    names, per_row = _class_names(hf), not chosen.per_token
    if per_row and hf.get("problem_type") == "multi_label_classification":
        raise ValueError(
            "problem_type 'multi_label_classification': several labels for one text are not supported; "
            'load(..., head="none") takes the body of the model without this head'
        )
    if per_row and (hf.get("problem_type") == "regression" or len(names) == 1):
        if len(names) != 1:
            raise ValueError(f"regression with {len(names)} outputs is not supported (only 1)")
        return {"regression": True}
    return {"labels": _unique(tuple(_class_name(name, number) for number, name in enumerate(names)))}


def _class_names(hf: Mapping[str, Any]) -> list[Any]:
    """Names of the classes in `id2label`, in their order; without it there are `num_labels`, two by default."""
    id2label = checked(hf.get("id2label"), dict | None, "id2label")
    if not id2label:
        count = checked(hf.get("num_labels", 2), int, "num_labels")
        if not 1 <= count <= MAX_SIZE:
            raise ValueError(f"num_labels {count} must be from 1 to {MAX_SIZE}")
        return [f"LABEL_{i}" for i in range(count)]
    if wrong := [number for number in id2label if not re.fullmatch(r"(0|[1-9][0-9]{0,8})", str(number))]:
        raise ValueError(f"id2label: expected the numbers of the classes, found {reprlib.repr(wrong[0])}")
    numbers = sorted(map(int, id2label))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"id2label numbers its labels {reprlib.repr(numbers)}, expected 0 to {len(numbers) - 1}")
    return [id2label[number] for number in sorted(id2label, key=int)]


def _class_name(name: Any, number: int) -> str:
    return str(checked(name, str | int | float, f"id2label: the name of class {number}"))


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        if numbers.setdefault(name, number) != number:
            raise ValueError(f"id2label gives the classes {numbers[name]} and {number} one name, {name!r}")
    return names


def write_labels(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_labels`."""
    if not HEADS[config.head].labelled:
        return {}
    names = ("LABEL_0",) if config.regression else config.labels
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression" if config.regression else None,
    }


# Both directions ----------------------------------------------------------------------------------------------------


def config_from_hf(family: Family, hf: Mapping[str, Any], head: str | None = None) -> ModelConfig:
    """The ModelConfig of a transformers config.

    Args:
      hf: contents of config.json.
      head: the head to assume for an architecture that the family does not list; `None` raises instead.

    Raises:
      ValueError: for an architecture or a setting that is not supported; the message names it.
    """
    architecture, *_ = checked(hf.get("architectures"), tuple[str, ...] | None, "architectures") or ("",)
    if architecture in family.architectures:
        fields = dict(family.architectures[architecture])
    elif head is None:
        what = f"unknown architecture {architecture!r}" if architecture else "config.json names no architecture"
        hint = nearest(architecture, family.architectures)
        raise ValueError(f"{what}; {hint} (load(..., head=...) takes the body of any {family.name})")
    else:
        fields = {"head": head}
    if head not in (None, fields["head"]) and HEADS[fields["head"]].labelled:
        # The stored head is dropped, so its class names and problem type need not be supported.
        labels: dict[str, Any] = {"labels": tuple(f"LABEL_{i}" for i in range(len(_class_names(hf))))}
    else:
        labels = read_labels(hf, fields["head"])
    return ModelConfig(family.name, **{**family.defaults, **family.from_hf(hf), **fields, **labels})


def config_to_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    """transformers' config.json of a model.

    Raises:
      NotExpressible: when the result, read back, would be the config of a different function.
    """
    architecture = architecture_of(family, config)
    hf = {
        "model_type": family.name,
        "architectures": [architecture],
        **family.to_hf(config),
        **write_labels(config),
    }
    try:
        restored = config_from_hf(family, hf)
    except ValueError as error:
        raise NotExpressible(f"transformers cannot hold these sizes: {error}") from None
    before, after = _function_fields(config), _function_fields(restored)
    for field in before:
        if before[field] != after[field]:
            raise NotExpressible(
                f"{architecture} cannot express {field}={before[field]!r}: it would be read back as {after[field]!r}"
            )
    return hf


def architecture_of(family: Family, config: ModelConfig) -> str:
    """The class of transformers that a config is loaded into."""
    for name, fields in family.architectures.items():
        if all(getattr(config, field) == value for field, value in fields.items()):
            return name
    heads = ", ".join(dict.fromkeys(fields["head"] for fields in family.architectures.values()))
    raise NotExpressible(f"transformers has no {family.name} with the head {config.head!r}; its heads are {heads}")


def _function_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that determine the function the network computes at inference, without those its head ignores."""
    fields = dict(vars(config))
    unused = {"dropout", "attention_dropout", "head_dropout", "init_std"}
    unused |= set(HEAD_FIELDS) - set(HEADS[config.head].fields(config))
    if config.window is None:
        unused |= {"window_from"}
    if not config.relative_buckets:
        unused |= {"relative_max_distance"}
    return {name: value for name, value in fields.items() if name not in unused}
