"""Between the tensors of a transformers checkpoint and the arrays of a parameter tree, one row at a time."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core import Parameter, flatten, nearest
from jaxlm.io.safetensors import Tensor, is_float
from jaxlm.models import FAMILIES
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import Family, Row, architecture_of
from jaxlm.models.heads import HEADS
from jaxlm.models.network import Network


class Found(NamedTuple):
    """What a transformers checkpoint holds of a model.

    Attributes:
      config: the model's; the head is untied if the checkpoint has one that differs from the token table.
      leaves: by path.
      dropped: names of tensors that belong to another head.
    """

    config: ModelConfig
    leaves: dict[str, Tensor]
    dropped: list[str]


@functools.lru_cache(maxsize=4)
def rows(config: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model, numbers filled in, in the order of the family's table; none of a head that it does not name.

    Raises:
      KeyError: when the table misses a parameter of the network: a mistake in the family.
    """
    family, spec = FAMILIES[config.family], flatten(Network(config).spec)
    if config.head not in family.heads:
        spec = {path: parameter for path, parameter in spec.items() if not path.startswith("head/")}
    numbered: list[Row] = []
    for row in family.names(config):
        numbers = range(max(config.num_layers, config.num_decoder_layers)) if "{i}" in row.hf else range(1)
        numbered += [row for row in map(row.at, numbers) if all(path in spec for path in row.paths)]
    covered = [path for row in numbered if not row.copy for path in row.paths]
    if sorted(covered) != sorted(spec):
        wrong = sorted(set(spec).symmetric_difference(covered)) or "a path named twice"
        raise KeyError(f"the names of {config.family} do not cover its parameters once: {wrong}")
    return tuple(numbered)


def to_transformers(config: ModelConfig, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as transformers names and lays them out."""
    family = FAMILIES[config.family]
    bare = HEADS[family.architectures[architecture_of(family, config)]["head"]].bare
    tensors = {}
    for row in rows(config):
        name = row.hf.removeprefix(f"{family.base}.") if bare else row.hf
        parts = [leaves[path] for path in row.paths]

        def read(dtype: Any = None, row: Row = row, parts: list[Tensor] = parts) -> np.ndarray:
            return row.join([part.read(dtype) for part in parts])

        tensors[name] = Tensor(row.shape([part.shape for part in parts]), parts[0].dtype, read, parts[0].location)
    return tensors


def from_transformers(config: ModelConfig, stored: Mapping[str, Tensor], where: str, strict: bool = True) -> Found:
    """The leaves of a model out of a transformers checkpoint.

    Names may carry or lack the base's prefix, be those of old releases (`LayerNorm.gamma`), or repeat a tied tensor.

    Args:
      config: of the stored model.
      stored: tensors by name.
      where: directory, for messages.
      strict: every tensor must be known and there; otherwise the head may lack, and tensors outside the base that
        are unknown are dropped.

    Raises:
      ValueError: a missing, unexpected or misshapen tensor, by name.
    """
    family = FAMILIES[config.family]
    config = _pooler(config, stored)
    tensors, unknown = _resolve(family, config, stored, where)
    config = _tie(family, config, tensors)
    spec = flatten(Network(config).spec)
    leaves: dict[str, Tensor] = {}
    copies = {row.paths: tensors.pop(row.hf, None) for row in rows(config) if row.copy}
    for row in rows(config):
        if row.copy:
            continue
        tensor = tensors.pop(row.hf, copies.get(row.paths))
        parameters = [spec[path] for path in row.paths]
        expected = row.shape([p.shape for p in parameters])
        head = row.paths[0].startswith("head/")
        if tensor is None:
            if strict or not head:
                raise ValueError(f"{where} lacks the tensor {row.hf!r}, expected with the shape {list(expected)}")
        elif tensor.shape != expected:
            if strict or not head:
                classes = HEADS[config.head].labelled and row.paths[0].startswith("head/output/")
                hint = f": id2label of config.json names {config.num_labels} classes" if classes else ""
                raise ValueError(
                    f"{tensor.location}: tensor {row.hf!r} has the shape {list(tensor.shape)}, "
                    f"expected {list(expected)}{hint}"
                )
            unknown.append(row.hf)
        elif not is_float(tensor.dtype):
            raise ValueError(
                f"{tensor.location}: tensor {row.hf!r} holds {tensor.dtype}, expected floating-point numbers; "
                "checkpoints quantized by other programs are not supported"
            )
        else:
            leaves |= _parts(row, tensor, parameters)
    leftover = sorted([*tensors, *unknown])
    surprising = [name for name in leftover if strict or _below_head(config, family, name)]
    if surprising:
        expected_names = {row.hf for row in rows(config)}
        raise ValueError(
            f"{where} holds the unexpected tensor {surprising[0]!r}; {nearest(surprising[0], expected_names)}"
        )
    return Found(config, leaves, leftover)


def _parts(row: Row, tensor: Tensor, parameters: list[Parameter]) -> dict[str, Tensor]:
    widths = [p.shape[-1] for p in parameters]

    def reader(index: int):
        if len(widths) == 1:
            return lambda dtype=None: row.part(tensor.read(dtype), 0, widths)
        # A copy, so that a part does not keep the whole in memory.
        return lambda dtype=None: row.part(tensor.read(dtype), index, widths).copy()

    return {
        path: Tensor(p.shape, tensor.dtype, reader(index), tensor.location)
        for index, (path, p) in enumerate(zip(row.paths, parameters, strict=True))
    }


def _pooler(config: ModelConfig, stored: Mapping[str, Tensor]) -> ModelConfig:
    """A bare encoder saved without its pooler has no head."""
    if config.head == "pooled" and not any(re.search(r"(^|\.)pooler\.", name) for name in stored):
        return config.replace(head="none")
    return config


def _resolve(
    family: Family, config: ModelConfig, stored: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Stored tensors by the full names of the family's rows, and the names that are none of these."""
    names = {row.hf for row in rows(config)} | family.aliases.keys()
    names |= {row.hf for row in rows(config.replace(tie_embeddings=False))}

    def known_as(name: str) -> str | None:
        modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        candidates = [modern, f"{family.base}.{modern}", modern.removeprefix(f"{family.base}.")]
        return next((candidate for candidate in candidates if candidate in names), None)

    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in stored.items():
        if re.fullmatch(family.ignored, name):
            continue
        full = known_as(name)
        if full is None:
            unknown.append(name)
        elif full in tensors:
            raise ValueError(f"{where} holds {full!r} twice, under two names")
        else:
            tensors[full] = tensor
    levels = zip(*(name.split(".")[:-1] for name in stored), strict=False)
    shared = ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, levels))
    for name in unknown:
        for part, rest in _unwrapped(name, shared):
            if part == "lora_A" or known_as(rest):
                what = WRAPPERS.get(part, "an object that holds the model")
                adapter = "merge its adapter (merge_and_unload), " * ("PEFT" in what)
                raise ValueError(
                    f"{where} holds the tensor {name!r}: {part!r} in its name comes from {what}, inside of which the "
                    f"model was saved; {adapter}take the model out of it and save that with save_pretrained"
                )
    return tensors, unknown


WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel, DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "lora_A": "PEFT",
    "base_layer": "PEFT",
    "base_model": "PEFT",
}
"""Part of a tensor's name -> the program that puts it there."""


def _unwrapped(name: str, shared: str) -> Iterator[tuple[str, str]]:
    """Parts of a name that wrappers put there, each with the name without all of them; `shared` begins every name.

    >>> list(_unwrapped("module._orig_mod.score.weight", ""))
    [('module', 'score.weight'), ('_orig_mod', 'score.weight')]
    >>> list(_unwrapped("net.bert.pooler.weight", "net.bert"))[0]
    ('net', 'bert.pooler.weight')
    """
    parts = name.split(".")
    plain = [part for part in parts if part not in WRAPPERS]
    for part in parts:
        if part in WRAPPERS:
            yield part, ".".join(plain)
            if plain[:1] == ["model"]:  # PEFT's second part, and that of a Llama
                yield part, ".".join(plain[1:])
    outer = shared.split(".") if shared else []
    for cut in range(1, len(outer) + 1):
        yield ".".join(outer[:cut]), ".".join(parts[cut:])


def _tie(family: Family, config: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
    """Removes second copies of tied tensors; an output matrix that differs from the token table unties the head."""
    names = {row.hf for row in rows(config)}
    for alias, source in family.aliases.items():
        if alias not in tensors or alias in names:
            continue
        if source not in tensors:
            tensors[source] = tensors.pop(alias)
        elif _equal(tensors[alias], tensors[source]):
            del tensors[alias]
        else:
            untied = config.replace(tie_embeddings=False)
            if any(row.hf == alias for row in rows(untied)):
                config, names = untied, {row.hf for row in rows(untied)}
    return config


def _equal(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.read().view(np.uint8), b.read().view(np.uint8))
    )


def _below_head(config: ModelConfig, family: Family, name: str) -> bool:
    """Whether a tensor is of the body, where nothing may be unknown (a pooler is not)."""
    inner = name.removeprefix(f"{family.base}.")
    if inner.startswith("pooler."):
        return False
    body = [row.hf.removeprefix(f"{family.base}.") for row in rows(config) if not row.paths[0].startswith("head/")]
    return inner != name or inner.split(".")[0] in {hf.split(".")[0] for hf in body}
