"""Pretrained models: from a directory or a hub into memory, with another head where one is wanted, and back."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Tree, abstract, arrays, flatten, initialize, lookup, unflatten, with_arrays
from jaxlm.io.adapter import Base
from jaxlm.io.hf_tensors import rows
from jaxlm.io.hub import find
from jaxlm.io.lm import LM
from jaxlm.io.model_directory import cast, open_model, write_model
from jaxlm.io.safetensors import MAX_SHARD_BYTES, Tensor
from jaxlm.models import FAMILIES, heads_of
from jaxlm.models.config import ModelConfig
from jaxlm.models.heads import HEADS
from jaxlm.models.network import Network


def load(
    path: str | Path,
    *,
    head: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    dtype: Any = None,
    key: jax.Array | None = None,
    base: LM | None = None,
) -> LM:
    """A model from a directory, ours or one of transformers, or from the Hugging Face hub.

    Tensors are read, converted and placed one at a time: beyond the model itself, at most two copies of its largest
    tensor are in memory.

    Args:
      path: a model directory, or a hub id when there is no such directory.
      head: another head than the stored one (`sequence`, `token`, `masked`, `causal`, `none`, …): the body is taken,
        what the head lacks is initialised. `lm.fresh` and `lm.dropped` say what was.
      labels: names of the classes of a sequence or token head; where they differ from the stored ones, its output
        is fresh.
      regression: a sequence head that predicts one number.
      dtype: of float parameters; `None` keeps the stored one.
      key: for fresh parameters; `jax.random.key(0)` if not given.
      base: the model that an adapter belongs to, whose arrays are then shared; by default it is loaded from the place
        that the adapter names.

    Raises:
      FileNotFoundError: nothing there, or a file is missing.
      ValueError: damaged or unsupported input; the message names the file and the tensor or the setting.
    """
    lm = open_fitted(path, head=head, labels=labels, regression=regression, base=base)
    lm = lm if dtype is None else cast(lm, dtype)
    # The largest first, while there is room for a second copy.
    tensors = sorted(arrays(lm.params).items(), key=lambda item: -item[1].nbytes)
    params = with_arrays(lm.params, {name: _place(tensor) for name, tensor in tensors})
    key = jax.random.key(0) if key is None else key

    def create(spec: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
        return jax.tree.map(lambda array: array.astype(dtype), initialize(key, spec))

    return lm.replace(params=_with_fresh(params, lm, dtype, create))


def load_abstract(
    path: str | Path, *, head: str | None = None, labels: Sequence[str] | None = None, regression: bool = False
) -> LM:
    """What `load` gives, with ShapeDtypeStructs for arrays: of the files only headers are read."""
    lm = open_fitted(path, head=head, labels=labels, regression=regression).shapes()
    return lm.replace(params=_with_fresh(lm.params, lm, None, abstract))


def open_fitted(
    path: str | Path,
    *,
    head: str | None,
    labels: Sequence[str] | None,
    regression: bool,
    base: LM | None = None,
) -> LM:
    """A model directory as the wanted model: Tensors without those of another head; what it lacks is in `fresh`."""
    stored = open_model(find(path), head, base and with_tensors(base))
    config = retarget(stored.config, head, labels, regression)
    params, fresh, dropped = _fit(stored, config)
    return stored.replace(config=config, params=params, fresh=tuple(fresh), dropped=(*stored.dropped, *dropped))


def save(
    lm: LM,
    path: str | Path,
    *,
    dtype: Any = None,
    native: bool = False,
    padded: bool = False,
    base: LM | str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> str | None:
    """Writes a model directory, in transformers' layout wherever that library can express the model.

    Args:
      lm: the model.
      path: directory to create, or a model directory to replace.
      dtype: of float parameters; `None` keeps theirs.
      base: the model that `lm` was made of, or its directory or hub id: an adapter is written, which holds what `lm`
        has beyond it. `load` finds a base by the place that was given here.
      native, padded, max_shard_bytes, progress: see `jaxlm.io.model_directory.write_model`.

    Returns:
      why transformers cannot read the directory, or `None` if it can.
    """
    lm = with_tensors(lm)
    lm = lm if dtype is None else cast(lm, dtype)
    below = None
    if base is not None:
        below = Base(with_tensors(base)) if isinstance(base, LM) else Base(open_model(find(base)), base)
    return write_model(
        Path(path), lm, native=native, padded=padded, base=below, max_shard_bytes=max_shard_bytes, progress=progress
    )


def with_tensors(lm: LM) -> LM:
    """The model with a Tensor for every array."""
    return lm.replace(params=with_arrays(lm.params, {n: Tensor.of(a, n) for n, a in arrays(lm.params).items()}))


def retarget(
    config: ModelConfig, head: str | None, labels: Sequence[str] | None = None, regression: bool = False
) -> ModelConfig:
    """The config of the same body with another head or other labels."""
    family = FAMILIES[config.family]
    if head is not None and head != config.head:
        lookup(heads_of(family), head, f"head of {config.family}")
        pooling = {name: family.defaults[name] for name in ("pooling", "pooler") if name in family.defaults}
        config = config.replace(head=head, next_sentence=False, labels=(), regression=False, **pooling)
    if labels is not None or regression:
        if not HEADS[config.head].labelled:
            heads = " or ".join(name for name, head in HEADS.items() if head.labelled)
            raise ValueError(f"labels and regression are for a {heads} head, this one is {config.head!r}")
        config = config.replace(labels=() if labels is None else tuple(labels), regression=regression)
    if HEADS[config.head].labelled and not config.num_labels:
        or_number = " or regression=True" * (not HEADS[config.head].per_token)
        raise ValueError(f"a {config.head} head needs labels=[...]{or_number}")
    return config


def _place(tensor: Tensor) -> jax.Array:
    """The tensor on the default device; its copy here is free again before the next one is read."""
    if isinstance(tensor.array, jax.Array):
        return tensor.array
    return jax.device_put(tensor.read(), may_alias=False).block_until_ready()


def _fit(stored: LM, config: ModelConfig) -> tuple[dict[str, Any], list[str], list[str]]:
    """The stored leaves that the wanted model takes; the paths it lacks; the paths it leaves."""
    spec, flat = flatten(Network(config).spec), flatten(stored.params)
    taken, dropped = {}, []
    for path, leaf in flat.items():
        if not path.startswith("head/") or (path in spec and _same_head(stored.config, config, path, leaf, spec)):
            taken[path] = leaf
        else:
            dropped.append(path)
    return unflatten(taken), [path for path in spec if path not in taken], dropped


def _same_head(before: ModelConfig, after: ModelConfig, path: str, leaf: Any, spec: Mapping[str, Any]) -> bool:
    """Whether a stored head parameter means the same in the wanted head."""
    if tuple(leaf.shape) != spec[path].shape:
        return False
    if before.head != after.head:
        # Only a pooler is shared, and only where transformers calls it the same (RoBERTa's classifier has its own).
        name = lambda config: next((row.hf for row in rows(config) if path in row.paths), None)  # noqa: E731
        return path.startswith("head/pooler/") and name(before) == name(after)
    renamed = before.labels != after.labels and any(not label.startswith("LABEL_") for label in before.labels)
    return not (renamed and path.startswith("head/output/"))


def _with_fresh(params: Tree, lm: LM, dtype: Any, create: Callable[[Mapping[str, Any], Any], dict[str, Any]]) -> Tree:
    """The tree with the leaves that `lm` lacks: `create(their spec, dtype)`, by default in that of the token table."""
    if not lm.fresh:
        return params
    spec, flat = flatten(lm.network.spec), flatten(params)
    if dtype is None:
        dtype = flat["embed/tokens/embedding"].dtype
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    return unflatten(flat | flatten(create({path: spec[path] for path in lm.fresh}, dtype)))
