"""LM: a model in memory, with all that goes on from one model directory to the next."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Axes, Context, Tap, Tree, arrays, with_arrays
from jaxlm.generate.decoding import generate, pad_after_strings
from jaxlm.io.carried import for_tokenizer
from jaxlm.io.safetensors import read_json
from jaxlm.models.config import ModelConfig
from jaxlm.models.heads import HEADS
from jaxlm.models.network import Network
from jaxlm.models.transformer import forward


class TokenizerFiles:
    """A directory with tokenizer files, read on first use."""

    def __init__(self, directory: Path):
        self.directory = directory

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # A native directory's config names a model that transformers does not know; the tokenizer is whole without it.
        native = read_json(self.directory / "config.json").get("model_type") == "jaxlm"
        reader = PreTrainedTokenizerFast if native else AutoTokenizer
        return reader.from_pretrained(self.directory, trust_remote_code=False)


@dataclass(frozen=True, eq=False)
class LM:
    """A language model: structure, parameters, axis names, tokenizer, and what its directory says besides.

    It is what `load` gives, surgery takes and gives, training begins from and ends in, and `save` writes (the Protocol
    `jaxlm.core.LM`).

    Attributes:
      config: the structure.
      params: parameters in the canonical view: jax arrays and Weights; tensors of a file that are not read yet, or
        shapes, where nothing is computed.
      tokenizer_source: a transformers tokenizer, a directory with its files, or `None`.
      axes: axis names by path. Those of the network's own parameters need not be given.
      carried: entries of transformers' config.json and generation_config.json that are not about the network.
      fresh: paths of head parameters that the directory did not have.
      dropped: stored tensors of another head, which were not taken.
    """

    config: ModelConfig
    params: Tree
    tokenizer_source: Any = None
    axes: Mapping[str, Axes] = field(default_factory=dict)
    carried: Mapping[str, Any] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __post_init__(self):
        network = self.network.axes()  # not those of a config before: another head's output has the same path
        added = {path: names for path, names in self.axes.items() if path not in network}
        object.__setattr__(self, "axes", network | added)
        if isinstance(self.tokenizer_source, Path):
            object.__setattr__(self, "tokenizer_source", TokenizerFiles(self.tokenizer_source))

    @classmethod
    def initialize(cls, config: ModelConfig, key: jax.Array, tokenizer: Any = None) -> "LM":
        """A model with initial parameters, float32."""
        return cls(config, Network(config).init(key), tokenizer)

    @property
    def network(self) -> Network:
        """The functions that follow from the structure."""
        return Network(self.config)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, or `None` when there is none; read on first use."""
        source = self.tokenizer_source
        return source.tokenizer if isinstance(source, TokenizerFiles) else source

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: what the generation config says, else the config, else the tokenizer.

        Those beyond the vocabulary are left out.
        """
        named = self.carried.get("generation", {}).get("eos_token_id", self.carried.get("eos_token_id"))
        if named is None and self.tokenizer is not None:
            named = self.tokenizer.eos_token_id
        ids = named if isinstance(named, list | tuple) else [] if named is None else [named]
        return tuple(number for number in ids if 0 <= number < self.config.vocab_size)

    def replace(self, **changes: Any) -> "LM":
        """The same with other fields."""
        return dataclasses.replace(self, **changes)

    def with_tokenizer(self, tokenizer: Any) -> "LM":
        """The same with another tokenizer, and the ids in `carried` as they are in its vocabulary."""
        carried = for_tokenizer(self.carried, self.tokenizer, tokenizer)
        source = self.tokenizer_source if tokenizer is self.tokenizer else tokenizer
        return dataclasses.replace(self, tokenizer_source=source, carried=carried)

    def shapes(self) -> "LM":
        """The same with ShapeDtypeStructs for arrays."""
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays(self.params).items()}
        return self.replace(params=with_arrays(self.params, shapes))

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
        if not HEADS[self.config.head].generates:
            raise ValueError(
                f"a model with the head {self.config.head!r} does not generate; it needs a causal or seq2seq one"
            )
        if key is None:
            if temperature > 0:
                raise ValueError("sampling needs a key: generate(..., key=jax.random.key(0)); temperature=0 is greedy")
            key = jax.random.key(0)
        check_prompts(batch)
        stop = self.end_ids if stop is None else (stop,) if isinstance(stop, str) else stop
        strings = [end for end in stop if isinstance(end, str)] if isinstance(stop, list | tuple) else []
        if strings and (self.tokenizer is None or not all(strings)):
            raise ValueError(
                f"stop {strings!r}: an empty string ends nothing; leave it out"
                if self.tokenizer is not None
                else f"stop {strings!r}: this model has no tokenizer to decode its tokens with; give ids of tokens"
            )
        ids = [end for end in stop if not isinstance(end, str)] if strings else stop
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
        pad_id = next(pad for pad in pads if pad is not None)
        return jnp.asarray(pad_after_strings(np.asarray(tokens), strings, self.tokenizer, pad_id))


def check_prompts(batch: Mapping[str, Any]) -> None:
    """Raises ValueError for a row without any real token: there is nothing to go on from."""
    ids = np.asarray(batch["input_ids"])
    real = np.asarray(batch.get("segment_ids", batch.get("attention_mask", np.ones_like(ids)))) > 0
    empty = np.flatnonzero(~real.any(axis=1))
    if len(empty):
        raise ValueError(
            f"row {empty[0]} of the prompts has no token to go on from; begin it with one, the begin token say"
        )
