"""The model directory, in one of two layouts.

*transformers*: that library's own (config.json, model.safetensors, tokenizer files), whenever it can express the model.
*native*: config.json says `model_type: jaxlm`, which transformers refuses plainly; arrays go by their names in the
parameter tree, and what kind of Weight or Site holds them is in jaxlm.json, with every static field. Tensors with many
zeros take less than their shape (`sparse`). Both carry jaxlm.json: format, layout and the whole ModelConfig.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import (
    Axes,
    Node,
    Site,
    arrays,
    call,
    describe,
    flatten,
    lookup,
    unflatten,
    with_arrays,
)
from jaxlm.io.names import from_transformers, to_transformers
from jaxlm.io.nodes import build_node, describe_node, take_tensor, tuples
from jaxlm.io.padding import pad_model
from jaxlm.io.sparse import compress, expand
from jaxlm.io.tensors import INDEX, MAX_SHARD_BYTES, SINGLE, open_tensors, read_json, write_tensors, write_text
from jaxlm.models import FAMILIES
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import NotExpressible, config_from_hf, config_to_hf
from jaxlm.models.transformer import model_spec

FORMAT = 1
CONFIG, OWN = "config.json", "jaxlm.json"
PADDED = "transformers"
"""Subdirectory of a native directory with the same model padded with zeros, in transformers' layout."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
CARRIED_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "max_position_embeddings",
    "task_specific_params",
    "tokenizer_class",
)
"""Entries of config.json that say nothing about the network and are carried along."""


class Stored(NamedTuple):
    """A model whose arrays are read when they are asked for.

    Attributes:
      config: its structure.
      params: the parameter tree, canonical view, with a Tensor for every array.
      axes: axis names of leaves that methods added (sites), by path.
      carried: entries of transformers' config.json that are not about the network.
      tokenizer: directory with tokenizer files, a transformers tokenizer, or `None`.
      dropped: stored tensors that were left out, because they belong to another head.
    """

    config: ModelConfig
    params: dict[str, Any]
    axes: Mapping[str, Axes] = {}
    carried: Mapping[str, Any] = {}
    tokenizer: Any = None
    dropped: tuple[str, ...] = ()


# Reading ------------------------------------------------------------------------------------------------------------


def open_model(directory: Path, head: str | None = None) -> Stored:
    """Opens a model directory of either layout; arrays are read later.

    Args:
      directory: of a model.
      head: the head wanted, which allows that the stored one is another, of an unknown class even; `None` takes the
        stored one, and then every tensor must be known and there.

    Raises:
      FileNotFoundError: no directory, config or tensors.
      ValueError: damaged or unsupported; the message names the file and the tensor or the setting.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory")
    own = read_json(directory / OWN) if (directory / OWN).is_file() else None
    if own is not None:
        _check_own(own, directory / OWN)
    tokenizer = directory if any((directory / name).is_file() for name in TOKENIZER_FILES) else None
    if own is not None and own["layout"] == "native":
        return _open_native(directory, own)._replace(tokenizer=tokenizer)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: not a model directory")
    hf = read_json(directory / CONFIG)
    try:
        config = _transformers_config(hf, own, head)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    found = from_transformers(config, open_tensors(directory), str(directory), strict=head is None)
    carried = {key: hf[key] for key in CARRIED_KEYS if hf.get(key) is not None}
    params = unflatten(found.leaves)
    return Stored(found.config, params, carried=carried, tokenizer=tokenizer, dropped=tuple(found.dropped))


def _check_own(own: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a jaxlm.json of another format, or one that lacks an entry."""
    if own.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {own.get('format')!r}, this version reads {FORMAT}")
    needed = ("layout", "config", *(("weights", "axes", "carried") if own.get("layout") == "native" else ()))
    missing = [key for key in needed if key not in own]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged, or not written by jaxlm")


def _transformers_config(hf: Mapping[str, Any], own: Mapping[str, Any] | None, head: str | None) -> ModelConfig:
    """The config of a directory in transformers' layout.

    jaxlm.json adds what transformers cannot say (a dropout rate of Llama, say), unless config.json has been changed
    by another program since: then it alone counts.
    """
    if hf.get("quantization_config"):
        raise ValueError("quantization_config: checkpoints quantized by other programs are not supported")
    family = lookup(FAMILIES, str(hf.get("model_type")), "model_type")
    config = config_from_hf(family, hf, head)
    if own is None:
        return config
    ours = call(ModelConfig, own["config"], OWN)
    written = config_to_hf(family, ours)
    return ours if all(key in hf and hf[key] == value for key, value in written.items()) else config


def _open_native(directory: Path, own: Mapping[str, Any]) -> Stored:
    config = call(ModelConfig, own["config"], str(directory / OWN))
    tensors = expand(open_tensors(directory), own.get("sparse", {}), directory / OWN)
    spec, weights = flatten(model_spec(config)), own["weights"]
    leaves: dict[str, Any] = {}
    for path in [*spec, *(path for path in weights if path not in spec)]:
        description = weights.get(path)
        leaf: Any = (
            take_tensor(tensors, path, directory / OWN)
            if description is None
            else build_node(description, path, tensors, directory / OWN)
        )
        if path not in spec:
            if not isinstance(leaf, Site):
                raise ValueError(f"{directory / OWN}: the network has no parameter {path!r}")
        elif leaf.shape != spec[path].shape:
            raise ValueError(
                f"{directory}: {path!r} has the shape {list(leaf.shape)}, expected {list(spec[path].shape)}"
            )
        leaves[path] = leaf
    if tensors:
        raise ValueError(f"{directory} holds the unexpected tensor {min(tensors)!r}")
    axes = {path: tuples(names) for path, names in own["axes"].items()}
    return Stored(config, unflatten(leaves), axes, own["carried"])


# Writing ------------------------------------------------------------------------------------------------------------


def write_model(
    directory: Path,
    stored: Stored,
    *,
    native: bool = False,
    padded: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> str | None:
    """Writes a model directory; it appears complete, or the previous one stays.

    Args:
      directory: to create, or a model directory to replace (files that are not a model's are kept).
      stored: the model.
      native: use the native layout even where transformers could express the model.
      padded: where transformers cannot express its sizes, put the model padded with zeros, which it can load and whose
        logits are the same, into the subdirectory `transformers`.
      max_shard_bytes: limit of one file of tensors.
      progress: told the bytes of each tensor once it is written.

    Returns:
      why the layout is native, or `None` where it is transformers' own.

    Raises:
      FileExistsError: the directory holds other things and no model.
      ValueError: an array that the config does not expect, or lacks; or no padding that transformers could express.
    """
    _check(stored)
    target = directory.resolve()
    recover(target)
    if target.exists() and any(target.iterdir()) and not ((target / OWN).exists() or (target / CONFIG).exists()):
        raise FileExistsError(f"{target} holds other files and no model; choose an empty or a new directory")
    staging = target.with_name(f".{target.name}.saving")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    reason = _write(staging, stored, native, max_shard_bytes, progress)
    if padded and reason is not None:
        config, params = pad_model(stored.config, stored.params)
        (staging / PADDED).mkdir()
        _write(staging / PADDED, stored._replace(config=config, params=params), False, max_shard_bytes, lambda _: None)
    _replace(staging, target)
    return reason


def _write(
    directory: Path, stored: Stored, native: bool, max_shard_bytes: int, progress: Callable[[int], None]
) -> str | None:
    """The files of a model; returns why the layout is native, or `None`."""
    reason = None
    own: dict[str, Any] = {"format": FORMAT, "layout": "transformers", "config": stored.config.to_json()}
    flat = flatten(stored.params)
    try:
        if native:
            raise NotExpressible("asked for")
        hf = _to_transformers_config(stored)
        tensors = to_transformers(stored.config, flat)
    except NotExpressible as error:
        reason = str(error)
        tensors, sparse = compress(arrays(stored.params))
        own |= {"sparse": sparse} if sparse else {}
        nodes = {path: describe_node(leaf) for path, leaf in flat.items() if isinstance(leaf, Node)}
        axes = {path: names for path, names in stored.axes.items() if isinstance(flat.get(path), Site)}
        own |= {"layout": "native", "weights": nodes, "axes": axes, "carried": stored.carried}
        hf = {"model_type": "jaxlm", "architectures": ["JaxlmModel"], "reason": reason}
    write_tensors(directory, tensors, max_shard_bytes, progress)
    _write_tokenizer(directory, stored.tokenizer, native=reason is not None)
    write_text(directory / OWN, [json.dumps(own, indent=2) + "\n"])
    write_text(directory / CONFIG, [json.dumps(hf, indent=2, sort_keys=True) + "\n"])
    return reason


def _check(stored: Stored) -> None:
    """The tree must be what the config says, plus sites."""
    spec, flat = flatten(model_spec(stored.config)), flatten(stored.params)
    for path in spec:
        if path not in flat:
            raise ValueError(f"the parameters lack {path!r}, which the config expects")
        if tuple(flat[path].shape) != spec[path].shape:
            raise ValueError(f"{path!r} has the shape {tuple(flat[path].shape)}, the config expects {spec[path].shape}")
    for path in flat.keys() - spec.keys():
        if not isinstance(flat[path], Site):
            raise ValueError(f"the parameters hold {path!r}, which the config does not expect (canonical view?)")
        if path not in stored.axes:
            raise ValueError(f"{path!r} has no axis names; whoever adds a site must name its axes")


def _to_transformers_config(stored: Stored) -> dict[str, Any]:
    flat = flatten(stored.params)
    for path, leaf in flat.items():
        if isinstance(leaf, Node):
            raise NotExpressible(f"transformers has no {type(leaf).__name__} ({path})")
    hf = config_to_hf(FAMILIES[stored.config.family], stored.config)
    widest = max((leaf.dtype for leaf in flat.values()), key=lambda dtype: dtype.itemsize)
    return {**stored.carried, **hf, "dtype": widest.name, "torch_dtype": widest.name}


def _write_tokenizer(directory: Path, tokenizer: Any, native: bool) -> None:
    if isinstance(tokenizer, Path):
        if native and "tokenizer_class" not in _json_if_there(tokenizer / "tokenizer_config.json"):
            # transformers would ask the config for the class, and does not know a native one.
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        else:
            for name in CARRIED_FILES:
                if (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, directory / name)
            return
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _of_a_model(name: str) -> bool:
    shard = re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)
    return shard is not None or name in (SINGLE, INDEX, CONFIG, OWN, PADDED, *CARRIED_FILES)


def recover(target: Path) -> None:
    """Finishes a replacement that was killed between its two renames: the previous model comes back."""
    previous = target.with_name(f".{target.name}.replaced")
    if previous.exists() and not target.exists():
        os.rename(previous, target)


def _replace(staging: Path, target: Path) -> None:
    """Puts a complete directory in the place of another, of which files that are not a model's are kept."""
    previous = target.with_name(f".{target.name}.replaced")
    if target.exists():
        if previous.exists():
            shutil.rmtree(previous)
        os.rename(target, previous)
    os.rename(staging, target)
    if previous.exists():
        for entry in previous.iterdir():
            if not _of_a_model(entry.name) and not (target / entry.name).exists():
                os.rename(entry, target / entry.name)
        shutil.rmtree(previous)


def cast(stored: Stored, dtype: Any) -> Stored:
    """The model with its float parameters in another dtype; scales, masks and codes keep theirs."""
    infos = describe(stored.params)
    values = {
        name: tensor.cast(dtype) if infos[name].role in ("base", "factor") else tensor
        for name, tensor in arrays(stored.params).items()
    }
    return stored._replace(params=with_arrays(stored.params, values))
