"""From `config.data` to tokenizers, prepared splits and batches on devices."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.data.loader import Batches, started
from jaxlm.data.ragged import Examples
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.io.model_directory import check_files
from jaxlm.models.config import ModelConfig
from jaxlm.parallel import spec_of, ways
from jaxlm.runner.config import digest
from jaxlm.tasks import TASKS, Prepared, Task
from jaxlm.tasks.task import with_unlabelled

_prepared: dict[str, Prepared] = {}


@dataclass(frozen=True)
class Texts:
    """Every text of every record, whatever its columns, read anew on every pass: what a tokenizer is trained on."""

    source: Source

    def __iter__(self) -> Iterator[str]:
        for record in self.source:
            for name in ("text", "text_pair", "source", "target"):
                if isinstance(record.get(name), str):  # of a bad row a task says so
                    yield record[name]
            words = record.get("tokens")
            if isinstance(words, list):
                # as words are encoded, every one after a space
                yield " " + " ".join(word for word in words if isinstance(word, str))


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


def prepare(
    name: str,
    task: Task,
    tokenizer: Any,
    labels: tuple[str, ...],
    settings: DataSettings,
    split: str,
    say=lambda text: None,
) -> Prepared:
    """One split, encoded; remembered for the other stages of a pipeline that read the same."""
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = digest([name, json.loads(vocabulary), labels, [str(v) for v in vars(settings).values()], split])
    if key not in _prepared:
        source = settings.source(split)
        found = task.prepare(source, tokenizer, labels, settings)
        tell_bad(source, split, say)
        for notice in found.notices if split == "train" else ():
            say(f"{split}: {notice}")
        if split == "train" and settings.unlabelled:
            more = unlabelled(name, task, tokenizer, settings, say)
            found = found._replace(examples=with_unlabelled(found.examples, more))
        _prepared[key] = found
    return _prepared[key]


def unlabelled(name: str, task: Task, tokenizer: Any, settings: DataSettings, say: Callable[[str], None]) -> Examples:
    """The texts of `config.data.unlabelled`, encoded.

    Raises:
      ValueError: for a task that knows none, or texts that a model is measured on.
    """
    if task.unlabelled is None:
        raise ValueError(
            f"config.data.unlabelled: the task {name!r} takes no texts without labels; those of sequence, regression "
            "and token do"
        )
    settings.refuse_evaluated(settings.unlabelled, "config.data.unlabelled")
    source = settings.source("unlabelled")
    found = task.unlabelled(source, tokenizer, settings)
    tell_bad(source, "unlabelled", say)
    return found


def tell_bad(source: Source, split: str, say: Callable[[str], None]) -> None:
    """Says which rows of a split were skipped."""
    for bad in source.bad[:5]:
        say(f"{split}: skipped {bad}")
    if len(source.bad) > 5:
        say(f"{split}: skipped {len(source.bad)} rows in all")


def prepare_splits(
    splits: Sequence[str],
    name: str,
    tokenizer: Any,
    labels: tuple[str, ...],
    settings: DataSettings,
    say=lambda text: None,
) -> dict[str, Prepared]:
    """Several splits of a task, encoded, whose padded batches have the same lengths and so share compiled programs."""
    found = {split: prepare(name, TASKS[name], tokenizer, labels, settings, split, say) for split in splits}
    together = tuple(prepared.examples for prepared in found.values())
    return {split: prepared._replace(fitted_to=together) for split, prepared in found.items()}


def batches_of(
    config: ModelConfig,
    task: Task,
    prepared: Prepared,
    tokenizer: Any,
    settings: DataSettings,
    batch_size: int,
    seed: int | None,
) -> Batches:
    """The batches of a split as a model reads them: its decoder begins with the token that it begins to write with."""
    return started(task.batches(prepared, tokenizer, settings, batch_size, seed), config.decoder_start_token_id)


def token_count(batch: Mapping[str, np.ndarray]) -> int:
    """Tokens of a batch that are not padding, on both sides."""
    masks = [batch[name] for name in ("segment_ids", "attention_mask", "decoder_attention_mask") if name in batch]
    return sum(int(np.count_nonzero(mask)) for mask in masks)


def to_devices(mesh: jax.sharding.Mesh, rules: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], Any]:
    """`global batch -> (its tokens, the batch on the devices)`.

    Every process makes the whole batch and gives its own devices their rows of it, whatever part of the mesh they are.
    """
    parts = ways("batch", mesh, rules)
    where = NamedSharding(mesh, spec_of(("batch",), (parts,), rules, mesh))

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, array.__getitem__)

    def place(batch: dict[str, np.ndarray]) -> tuple[int, dict[str, jax.Array]]:
        rows = len(batch["input_ids"])
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows does not divide over the {parts} devices of config.mesh that share it; "
                f"make config.train.batch_size a multiple of {parts}"
            )
        placed: dict[str, jax.Array] = {
            n: jax.make_array_from_callback(a.shape, where, a.__getitem__) for n, a in batch.items()
        }
        return token_count(batch), placed

    return place


def batch_shapes(batches: Batches, place: Callable) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Every shape of batch that can come, placed."""
    placed = [place(batches(-1 - kind))[1] for kind in range(batches.kinds)]
    return [{n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in b.items()} for b in placed]
