"""The model directory, in one of three layouts.

*transformers*: that library's own (config.json, model.safetensors, tokenizer files), whenever it can express the model.
*native*: config.json says `model_type: jaxlm`, which transformers refuses plainly; arrays go by their names in the
parameter tree, and what kind of Weight or Site holds them is in jaxlm.json, with every static field. Tensors with many
zeros take less than their shape (`sparse`). Both carry jaxlm.json: format, layout and the whole ModelConfig.
"""

import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import (
    Axes,
    Node,
    Site,
    arrays,
    call,
    checked,
    describe,
    flatten,
    lookup,
    unflatten,
    with_arrays,
)
from jaxlm.io.adapter import Base, Described, beyond, borrowed_tensors
from jaxlm.io.carried import GENERATION, GENERATION_FILE, carried_of
from jaxlm.io.hf_padding import pad_model
from jaxlm.io.hf_tensors import from_transformers, to_transformers
from jaxlm.io.lm import LM, TokenizerFiles
from jaxlm.io.safetensors import (
    INDEX,
    MAX_SHARD_BYTES,
    SINGLE,
    Tensor,
    find_file,
    is_float,
    open_tensors,
    read_json,
    write_tensors,
    write_text,
)
from jaxlm.io.sparse_tensors import compress, expand
from jaxlm.io.weight_metadata import build_node, check_node, describe_node, take_tensor, tuples
from jaxlm.models import FAMILIES
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import NotExpressible, config_from_hf, config_to_hf
from jaxlm.models.network import Network

FORMAT = 1
CONFIG, OWN = "config.json", "jaxlm.json"
NATIVE = ("config", "weights", "axes", "carried")
NEEDED = {"transformers": ("config",), "native": NATIVE, "adapter": (*NATIVE, "base")}
"""Entries of jaxlm.json by layout."""
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


# Reading ------------------------------------------------------------------------------------------------------------


def open_model(directory: Path, head: str | None = None, base: LM | None = None, above: tuple[Path, ...] = ()) -> LM:
    """Opens a model directory of any layout: an LM with a Tensor for every array, read when it is asked for.

    Its head may lack parameters; `load` fits it to what is wanted.

    Args:
      directory: of a model.
      head: the head wanted, which allows that the stored one is another, of an unknown class even; `None` takes the
        stored one, and then every tensor must be known and there.
      base: of an adapter, with Tensors; `None` opens the one that the adapter names.
      above: adapters that are being opened and stand on this directory.

    Raises:
      FileNotFoundError: no directory, config or tensors.
      ValueError: damaged or unsupported; the message names the file and the tensor or the setting.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory")
    check_files(directory)
    described = read_json(path) if (path := find_file(directory, OWN)) else None
    written = _written_config(described, directory / OWN) if described is not None else None
    tokenizer = directory if any(find_file(directory, name) for name in TOKENIZER_FILES) else None
    generation = read_json(path) if (path := find_file(directory, GENERATION_FILE)) else None
    if described is not None and written is not None and described["layout"] in ("native", "adapter"):
        carried = _carried(directory / OWN, described["carried"], generation)
        tensors = expand(open_tensors(directory), described.get("sparse", {}), directory / OWN)
        if described["layout"] == "adapter":
            entry = Described.of(described["base"], directory / OWN)
            above = (*above, directory.resolve())
            base = open_model(entry.location(directory, above), above=above) if base is None else base
            tensors |= borrowed_tensors(entry, base, directory / OWN)
            tokenizer = tokenizer or base.tokenizer_source
        params, axes = _native_params(directory, described, written, tensors)
        return LM(written, params, tokenizer, axes, carried)
    if find_file(directory, CONFIG) is None:
        adapter = ", but the adapter of one: merge it into its model (merge_and_unload of PEFT) and save that"
        hint = adapter if find_file(directory, "adapter_config.json") else ""
        raise FileNotFoundError(f"{directory} has no {CONFIG}: not a model directory{hint}")
    hf = read_json(directory / CONFIG)
    try:
        config = _transformers_config(hf, written, head)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    checkpoint = from_transformers(config, open_tensors(directory), str(directory), strict=head is None)
    carried = _carried(directory / CONFIG, hf, generation)
    return LM(
        checkpoint.config, unflatten(checkpoint.leaves), tokenizer, carried=carried, dropped=tuple(checkpoint.dropped)
    )


def _carried(path: Path, config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is carried of a directory, whose config is in the file `path`."""
    try:
        return carried_of(config, generation)
    except ValueError as error:
        raise ValueError(f"{path}, or {GENERATION_FILE} beside it: {error}") from None


def check_files(directory: Path) -> None:
    """Raises ValueError for a link out of a directory among the files that transformers reads of a tokenizer."""
    for path in (*directory.iterdir(), *directory.glob("additional_chat_templates/*")):
        if path.suffix in (".json", ".txt", ".model", ".jinja"):
            find_file(directory, str(path.relative_to(directory)))


def _written_config(described: Mapping[str, Any], path: Path) -> ModelConfig:
    """The config in a jaxlm.json.

    Raises:
      ValueError: another format, or an entry that is missing or of another kind.
    """
    if type(described.get("format")) is not int or described["format"] != FORMAT:
        raise ValueError(f"{path} has the format {reprlib.repr(described.get('format'))}, this version reads {FORMAT}")
    layout = described.get("layout", "transformers")
    if not isinstance(layout, str) or layout not in NEEDED:
        raise ValueError(f"{path} has the layout {reprlib.repr(layout)}, expected {' or '.join(NEEDED)}")
    needed = ("layout", *NEEDED[layout])
    missing = [key for key in needed if key not in described]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged, or not written by jaxlm")
    for key in needed[1:]:
        checked(described[key], dict, f"{path}: {key}")
    try:
        config = call(ModelConfig, described["config"], "config")
        lookup(FAMILIES, config.family, "family")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _transformers_config(hf: Mapping[str, Any], written: ModelConfig | None, head: str | None) -> ModelConfig:
    """The config of a directory in transformers' layout.

    jaxlm.json adds what transformers cannot say (a dropout rate of Llama, say), unless config.json has been changed
    by another program since: then it alone counts.
    """
    if hf.get("quantization_config"):
        raise ValueError("quantization_config: checkpoints quantized by other programs are not supported")
    family = lookup(FAMILIES, checked(hf.get("model_type"), str, "model_type"), "model_type")
    config = config_from_hf(family, hf, head)
    if written is None or written.family != config.family:
        return config
    try:
        hf_of_written = config_to_hf(family, written)
    except NotExpressible:  # config.json cannot come from it
        return config
    return written if all(key in hf and hf[key] == value for key, value in hf_of_written.items()) else config


def _native_params(
    directory: Path, described: Mapping[str, Any], config: ModelConfig, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Axes]]:
    """Parameters of the native layout, whose tensors it takes, and the axis names of leaves that methods added."""
    file = directory / OWN
    spec, weights = flatten(Network(config).spec), described["weights"]
    axes = {path: tuples(names) for path, names in described["axes"].items()}
    leaves: dict[str, Any] = {}
    for path in [*spec, *sorted((weights.keys() | axes.keys()) - spec.keys())]:
        description = weights.get(path)
        leaf: Any = (
            take_tensor(tensors, path, file) if description is None else build_node(description, path, tensors, file)
        )
        if path not in spec:
            _check_added(path, {*spec, *leaves}, axes, file)
            if isinstance(leaf, Node):
                check_node(leaf, axes[path], path, file)
            elif len(leaf.shape) != len(axes[path]):
                raise ValueError(f"{file}: {path!r} has the shape {list(leaf.shape)}, but {len(axes[path])} axis names")
        elif isinstance(leaf, Site):
            raise ValueError(f"{file}: the parameter {path!r} cannot be a {type(leaf).__name__}")
        elif isinstance(leaf, Node):
            check_node(leaf, ("in", "out"), path, file)
        elif not is_float(leaf.dtype):
            raise ValueError(f"{directory}: {path!r} holds {leaf.dtype}, expected floating-point numbers")
        if path in spec and leaf.shape != spec[path].shape:
            raise ValueError(
                f"{directory}: {path!r} has the shape {list(leaf.shape)}, expected {list(spec[path].shape)}"
            )
        leaves[path] = leaf
    if tensors:
        raise ValueError(f"{directory} holds the unexpected tensor {min(tensors)!r}")
    if stray := axes.keys() & spec.keys():
        raise ValueError(f"{file}: there are axis names for {min(stray)!r}, which has its own")
    return unflatten(leaves), axes


def _check_added(path: str, leaves: Collection[str], axes: Mapping[str, Any], file: Path) -> None:
    """What a method added, a site or an array, lies at a place of its own, and the axes of its array have names."""
    if any(leaf.startswith(f"{path}/") or path.startswith(f"{leaf}/") for leaf in leaves):
        raise ValueError(f"{file}: the network has no place for {path!r}")
    try:
        checked(axes.get(path), tuple[str | tuple[str, ...] | None, ...], "expected a name for each axis")
    except ValueError as error:
        raise ValueError(f"{file}: {path!r}: {error}") from None


# Writing ------------------------------------------------------------------------------------------------------------


def write_model(
    directory: Path,
    lm: LM,
    *,
    native: bool = False,
    padded: bool = False,
    base: Base | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> str | None:
    """Writes a model directory; it appears complete, or the previous one stays.

    Args:
      directory: to create, or a model directory to replace (files that are not a model's are kept).
      lm: the model, with Tensors for arrays.
      native: use the native layout even where transformers could express the model.
      padded: where transformers cannot express its sizes, put the model padded with zeros, which it can load and whose
        logits are the same, into the subdirectory `transformers`.
      base: write an adapter: what the model has beyond this one.
      max_shard_bytes: limit of one file of tensors.
      progress: told the bytes of each tensor once it is written.

    Returns:
      why the layout is native, or `None` where it is transformers' own.

    Raises:
      FileExistsError: the directory holds other things and no model.
      ValueError: an array that the config does not expect, or lacks; or no padding that transformers could express.
    """
    _check(lm)
    target = directory.resolve()
    if base is not None and base.path is not None and Path(base.path).expanduser().resolve() == target:
        raise ValueError(f"{target} is the base of the adapter, which would take its place; choose another directory")
    recover(target)
    if target.exists() and any(target.iterdir()) and not ((target / OWN).exists() or (target / CONFIG).exists()):
        raise FileExistsError(f"{target} holds other files and no model; choose an empty or a new directory")
    staging = target.with_name(f".{target.name}.saving")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    contents = _adapter(lm, base, target) if base else _contents(lm, native)
    _write(staging, lm, contents, max_shard_bytes, progress)
    if padded and contents.reason is not None:
        config, params = pad_model(lm.config, lm.params)
        (staging / PADDED).mkdir()
        lm = lm.replace(config=config, params=params)
        _write(staging / PADDED, lm, _contents(lm, native=False), max_shard_bytes, lambda _: None)
    _replace(staging, target)
    return contents.reason


class Contents(NamedTuple):
    """What a model directory holds besides the tokenizer: tensors, jaxlm.json, config.json; why it is not
    transformers' layout, or `None`."""

    tensors: Mapping[str, Tensor]
    described: dict[str, Any]
    config: dict[str, Any]
    reason: str | None = None


def _contents(lm: LM, native: bool) -> Contents:
    """The contents of a whole model, in transformers' layout where it can be and need not be native."""
    try:
        if native:
            raise NotExpressible("asked for")
        described = {"format": FORMAT, "layout": "transformers", "config": lm.config.to_json()}
        config = _to_transformers_config(lm)
        return Contents(to_transformers(lm.config, flatten(lm.params)), described, config)
    except NotExpressible as error:
        return _native(lm, arrays(lm.params), str(error))


def _native(lm: LM, tensors: Mapping[str, Tensor], reason: str) -> Contents:
    """The contents of the native layout, with these of the model's arrays."""
    flat, spec = flatten(lm.params), flatten(lm.network.spec)
    stored, sparse = compress(tensors)
    described = {
        "format": FORMAT,
        "layout": "native",
        "config": lm.config.to_json(),
        **({"sparse": sparse} if sparse else {}),
        "weights": {path: describe_node(leaf) for path, leaf in flat.items() if isinstance(leaf, Node)},
        "axes": {path: names for path, names in lm.axes.items() if path in flat.keys() - spec},
        "carried": {key: value for key, value in lm.carried.items() if key != GENERATION},
    }
    return Contents(
        stored, described, {"model_type": "jaxlm", "architectures": ["JaxlmModel"], "reason": reason}, reason
    )


def _adapter(lm: LM, base: Base, target: Path) -> Contents:
    """The contents of an adapter, whose arrays are those beyond the base."""
    tensors, entry = beyond(lm, base, target)
    contents = _native(lm, tensors, "an adapter")
    return contents._replace(described=contents.described | {"layout": "adapter", "base": entry})


def _write(directory: Path, lm: LM, contents: Contents, max_shard_bytes: int, progress: Callable[[int], None]) -> None:
    """The files of a model."""
    write_tensors(directory, contents.tensors, max_shard_bytes, progress)
    _write_tokenizer(directory, lm.tokenizer_source, native=contents.reason is not None)
    if GENERATION in lm.carried:
        write_text(directory / GENERATION_FILE, [json.dumps(lm.carried[GENERATION], indent=2, sort_keys=True) + "\n"])
    write_text(directory / OWN, [json.dumps(contents.described, indent=2) + "\n"])
    write_text(directory / CONFIG, [json.dumps(contents.config, indent=2, sort_keys=True) + "\n"])


def _check(lm: LM) -> None:
    """The tree must be what the config says, plus what methods added and named the axes of."""
    spec, flat = flatten(lm.network.spec), flatten(lm.params)
    for path in spec:
        if path not in flat:
            raise ValueError(f"the parameters lack {path!r}, which the config expects")
        if tuple(flat[path].shape) != spec[path].shape:
            raise ValueError(f"{path!r} has the shape {tuple(flat[path].shape)}, the config expects {spec[path].shape}")
    for path in flat.keys() - spec.keys():
        if path not in lm.axes:
            raise ValueError(
                f"the parameters hold {path!r}, which the config does not expect and which has no axis names (is this "
                "the canonical view? whoever adds a leaf must name its axes)"
            )


def _to_transformers_config(lm: LM) -> dict[str, Any]:
    flat, spec = flatten(lm.params), flatten(lm.network.spec)
    for path, leaf in flat.items():
        if isinstance(leaf, Node):
            raise NotExpressible(f"transformers has no {type(leaf).__name__} ({path})")
        if path not in spec:
            raise NotExpressible(f"transformers has no {path}")
    hf = config_to_hf(FAMILIES[lm.config.family], lm.config)
    widest = max((leaf.dtype for leaf in flat.values()), key=lambda dtype: dtype.itemsize)
    carried = {key: value for key, value in lm.carried.items() if key != GENERATION}
    return {**carried, **hf, "dtype": widest.name, "torch_dtype": widest.name}


def _write_tokenizer(directory: Path, source: Any, native: bool) -> None:
    """Copies tokenizer files as they are, or writes the tokenizer anew.

    A native directory must name the tokenizer's class, because transformers would ask the config for it and does not
    know a native one.
    """
    named = isinstance(source, TokenizerFiles) and "tokenizer_class" in _json_if_there(
        source.directory / "tokenizer_config.json"
    )
    if isinstance(source, TokenizerFiles) and (named or not native):
        for name in TOKENIZER_FILES:
            if (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, directory / name)
    elif isinstance(source, TokenizerFiles):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False).save_pretrained(directory)
    elif source is not None:
        source.save_pretrained(directory)


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _of_a_model(name: str) -> bool:
    shard = re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)
    return shard is not None or name in (SINGLE, INDEX, CONFIG, OWN, PADDED, GENERATION_FILE, *TOKENIZER_FILES)


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


def cast(lm: LM, dtype: Any) -> LM:
    """The model (with Tensors) with its float parameters in another dtype; scales, masks and codes keep theirs."""
    infos = describe(lm.params)
    values = {
        name: tensor.cast(dtype) if infos[name].role in ("base", "factor") else tensor
        for name, tensor in arrays(lm.params).items()
    }
    return lm.replace(params=with_arrays(lm.params, values))
