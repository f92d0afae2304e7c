"""LM: a model in memory, and how it comes from a directory and goes into one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Axes, Context, Tap, Tree, arrays, axis_names, flatten, initialize, lookup, unflatten, with_arrays
from jaxlm.generate.decoding import ended, generate
from jaxlm.io.hf_tensors import rows
from jaxlm.io.model_directory import Stored, cast, open_model, write_model
from jaxlm.io.safetensors import MAX_SHARD_BYTES, Tensor, read_json
from jaxlm.models import FAMILIES
from jaxlm.models.config import ModelConfig
from jaxlm.models.transformer import forward, model_spec


@dataclass(frozen=True, eq=False)
class LM:
    """A language model: structure, parameters, tokenizer.

    Attributes:
      config: the structure.
      params: parameters in the canonical view, jax arrays and Weights.
      tokenizer_source: directory with tokenizer files, a transformers tokenizer, or `None`.
      site_axes: axis names of leaves that methods added, by path.
      carried: entries of transformers' config.json that are not about the network.
      fresh: paths of head parameters that the directory did not have.
      dropped: stored tensors of another head, which were not taken.
    """

    config: ModelConfig
    params: Tree
    tokenizer_source: Any = None
    site_axes: Mapping[str, Axes] = field(default_factory=dict)
    carried: Mapping[str, Any] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, or `None` when the directory has none; read on first use."""
        if not isinstance(self.tokenizer_source, Path):
            return self.tokenizer_source
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # A native directory's config names a model that transformers does not know; the tokenizer is whole without it.
        native = read_json(self.tokenizer_source / "config.json").get("model_type") == "jaxlm"
        reader = PreTrainedTokenizerFast if native else AutoTokenizer
        return reader.from_pretrained(self.tokenizer_source, trust_remote_code=False)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: what the generation config says, else the config, else the tokenizer."""
        return end_ids(self.carried, self.tokenizer, self.config.vocab_size)

    @property
    def spec(self) -> dict[str, Any]:
        """Every parameter of the network: shape, axis names, initial distribution."""
        return model_spec(self.config)

    @property
    def axes(self) -> dict[str, Axes]:
        """Axis names by path."""
        return {**axis_names(self.spec), **self.site_axes}

    def apply(
        self,
        params: Tree,
        batch: Mapping[str, Any],
        *,
        taps: Collection[Tap] = (),
        key: jax.Array | None = None,
        dtype: Any = jnp.float32,
        remat: str = "none",
    ) -> dict[str, Any]:
        """The forward pass, pure: see `jaxlm.models.transformer.forward`.

        Args:
          params: `lm.params`, or others of the same structure.
          batch: numpy or jax arrays: `input_ids [batch, length]`, `attention_mask`, …
          taps: hidden states and attention wanted in `outputs["taps"]`.
          key: dropout key; `None` is evaluation.
          dtype: of activations.

        Returns:
          `logits` float32, `last_hidden`, `taps`, and what else the head gives.
        """
        batch = {name: jnp.asarray(value) for name, value in batch.items()}
        return forward(self.config, params, batch, ctx=Context(key=key), taps=taps, dtype=dtype, remat=remat)

    def generate(
        self,
        batch: Mapping[str, Any],
        *,
        new_tokens: int,
        key: jax.Array | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Any = None,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Continues every row: int32 `[batch, new_tokens]`; see `jaxlm.generate.decoding.generate`.

        Prompts of unequal length are padded on either side, with an `attention_mask`. Sampling (`temperature` above 0)
        needs a `key`.

        Args:
          stop: what ends a row: ids of tokens and strings, one or several. `None` is what the model itself says
            (`end_ids`), `()` nothing. A row that meets an id repeats it; behind the token that completes a string in
            the decoded text there is padding.

        Raises:
          ValueError: for a row without any token, a `stop` that is no id of the vocabulary, or strings without a
            tokenizer to decode with.
        """
        if self.config.head not in ("causal", "seq2seq"):
            raise ValueError(
                f"a model with the head {self.config.head!r} does not generate; it needs a causal or seq2seq one"
            )
        if key is None:
            if temperature > 0:
                raise ValueError("sampling needs a key: generate(..., key=jax.random.key(0)); temperature=0 is greedy")
            key = jax.random.key(0)
        check_prompts(batch)
        stop = self.end_ids if stop is None else (stop,) if isinstance(stop, str) else stop
        strings = [each for each in stop if isinstance(each, str)] if isinstance(stop, list | tuple) else []
        if strings and (self.tokenizer is None or not all(strings)):
            raise ValueError(
                f"stop {strings!r}: an empty string ends nothing; leave it out"
                if self.tokenizer is not None
                else f"stop {strings!r}: this model has no tokenizer to decode its tokens with; give ids of tokens"
            )
        ids = [each for each in stop if not isinstance(each, str)] if strings else stop
        tokens = generate(
            self.config,
            self.params,
            {name: jnp.asarray(value) for name, value in batch.items()},
            key,
            new_tokens=new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=ids,
            dtype=dtype,
        )
        if not strings:
            return tokens
        pads = (self.tokenizer.pad_token_id, self.config.pad_token_id, *self.end_ids, 0)
        pad_id = next(each for each in pads if each is not None)
        return jnp.asarray(ended(np.asarray(tokens), strings, self.tokenizer, pad_id))


def end_ids(carried: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text, of a model's carried configs and its tokenizer; those beyond the vocabulary left out."""
    named = carried.get("generation", {}).get("eos_token_id", carried.get("eos_token_id"))
    if named is None and tokenizer is not None:
        named = tokenizer.eos_token_id
    ids = named if isinstance(named, list | tuple) else [] if named is None else [named]
    return tuple(each for each in ids if 0 <= each < vocab_size)


def check_prompts(batch: Mapping[str, Any]) -> None:
    """Raises ValueError for a row without any real token: there is nothing to go on from."""
    ids = np.asarray(batch["input_ids"])
    real = np.asarray(batch.get("segment_ids", batch.get("attention_mask", np.ones_like(ids)))) > 0
    empty = np.flatnonzero(~real.any(axis=1))
    if len(empty):
        raise ValueError(
            f"row {empty[0]} of the prompts has no token to go on from; begin it with one, the begin token say"
        )


def load(
    path: str | Path,
    *,
    head: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    dtype: Any = None,
    key: jax.Array | None = None,
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

    Raises:
      FileNotFoundError: nothing there, or a file is missing.
      ValueError: damaged or unsupported input; the message names the file and the tensor or the setting.
    """
    stored = open_model(find(path), head)
    config = retarget(stored.config, head, labels, regression)
    params, fresh, dropped = _fit(stored, config)
    stored = stored._replace(params=params)
    if dtype is not None:
        stored = cast(stored, dtype)
    # The largest first, while there is room for a second copy.
    tensors = sorted(arrays(stored.params).items(), key=lambda item: -item[1].nbytes)
    tree = with_arrays(stored.params, {name: _place(tensor) for name, tensor in tensors})
    if fresh:
        tree = _initialize(tree, config, fresh, dtype, key)
    return LM(
        config,
        tree,
        tokenizer_source=stored.tokenizer,
        site_axes=stored.axes,
        carried=stored.carried,
        fresh=tuple(fresh),
        dropped=(*stored.dropped, *dropped),
    )


def save(
    lm: LM,
    path: str | Path,
    *,
    dtype: Any = None,
    native: bool = False,
    padded: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> str | None:
    """Writes a model directory, in transformers' layout wherever that library can express the model.

    Args:
      lm: the model.
      path: directory to create, or a model directory to replace.
      dtype: of float parameters; `None` keeps theirs.
      native, padded, max_shard_bytes, progress: see `jaxlm.io.model_directory.write_model`.

    Returns:
      why transformers cannot read the directory, or `None` if it can.
    """
    tensors = {name: Tensor.of(value, name) for name, value in arrays(lm.params).items()}
    params = with_arrays(lm.params, tensors)
    stored = Stored(lm.config, params, lm.site_axes, lm.carried, lm.tokenizer_source)
    stored = stored if dtype is None else cast(stored, dtype)
    return write_model(
        Path(path), stored, native=native, padded=padded, max_shard_bytes=max_shard_bytes, progress=progress
    )


def find(path: str | Path) -> Path:
    """The directory itself, or a snapshot of a hub repository: safetensors, configs and tokenizer files only."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; a model is a directory with config.json and model.safetensors")
    if not isinstance(path, str) or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no directory {path} (working directory {Path.cwd()})")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the client raises many kinds, most of them about the network
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{path} is no directory here, and the Hugging Face hub did not give it: {first}"
        ) from error


def retarget(
    config: ModelConfig, head: str | None, labels: Sequence[str] | None = None, regression: bool = False
) -> ModelConfig:
    """The config of the same body with another head or other labels."""
    family = FAMILIES[config.family]
    if head is not None and head != config.head:
        heads = {own["head"]: None for own in family.architectures.values()} | {"none": None}
        lookup(heads, head, f"head of {config.family}")
        own = {name: family.defaults[name] for name in ("pooling", "pooler") if name in family.defaults}
        config = config.replace(head=head, next_sentence=False, labels=(), regression=False, **own)
    if labels is not None or regression:
        if config.head not in ("sequence", "token"):
            raise ValueError(f"labels and regression are for a sequence or token head, this one is {config.head!r}")
        config = config.replace(labels=() if labels is None else tuple(labels), regression=regression)
    if config.head in ("sequence", "token") and not config.num_labels:
        raise ValueError(
            f"a {config.head} head needs labels=[...]" + (" or regression=True" * (config.head == "sequence"))
        )
    return config


def _place(tensor: Tensor) -> jax.Array:
    """The tensor on the default device; its copy here is free again before the next one is read."""
    return jax.device_put(tensor.read(), may_alias=False).block_until_ready()


def _fit(stored: Stored, config: ModelConfig) -> tuple[dict[str, Any], list[str], list[str]]:
    """The stored leaves that the wanted model takes; the paths it lacks; the paths it leaves."""
    spec, flat = flatten(model_spec(config)), flatten(stored.params)
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


def _initialize(tree: Tree, config: ModelConfig, fresh: list[str], dtype: Any, key: jax.Array | None) -> dict[str, Any]:
    spec, flat = flatten(model_spec(config)), flatten(tree)
    if dtype is None:
        dtype = flat["embed/tokens/embedding"].dtype
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    new = flatten(initialize(jax.random.key(0) if key is None else key, {path: spec[path] for path in fresh}))
    return unflatten({**flat, **{path: value.astype(dtype) for path, value in new.items()}})
