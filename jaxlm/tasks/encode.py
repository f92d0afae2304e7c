"""From `config.data` to encoded splits and their batches, checked against the model that is to read them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.core.strict_json import digest
from jaxlm.data.loader import Batches, with_decoder_start
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id
from jaxlm.tasks import TASKS, Prepared, Task
from jaxlm.tasks.task import with_unlabelled

_prepared: dict[str, Prepared] = {}


def prepare(
    name: str,
    task: Task,
    tokenizer: Any,
    labels: tuple[str, ...],
    settings: DataSettings,
    split: str,
    info=lambda text: None,
) -> Prepared:
    """One split, encoded; remembered for the other stages of a pipeline that read the same."""
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = digest([name, json.loads(vocabulary), labels, [str(v) for v in vars(settings).values()], split])
    if key not in _prepared:
        source = settings.source(split)
        prepared = task.prepare(source, tokenizer, labels, settings)
        if prepared.examples.group != task.group:
            raise ValueError(f"the task {name!r} has groups of {task.group}, its examples of {prepared.examples.group}")
        report_bad_rows(source, split, info)
        for notice in prepared.notices if split == "train" else ():
            info(f"{split}: {notice}")
        if split == "train" and settings.unlabelled:
            examples = unlabelled(name, task, tokenizer, settings, info)
            prepared = prepared._replace(examples=with_unlabelled(prepared.examples, examples))
        _prepared[key] = prepared
    return _prepared[key]


def unlabelled(name: str, task: Task, tokenizer: Any, settings: DataSettings, info: Callable[[str], None]) -> Examples:
    """The texts of `config.data.unlabelled`, encoded.

    Raises:
      ValueError: for a task that knows none, or texts that a model is measured on.
    """
    if task.unlabelled is None:
        raise ValueError(
            f"config.data.unlabelled: the task {name!r} takes no unlabelled data; those of sequence, regression "
            "and token do"
        )
    settings.refuse_evaluated(settings.unlabelled, "config.data.unlabelled")
    source = settings.source("unlabelled")
    examples = task.unlabelled(source, tokenizer, settings)
    report_bad_rows(source, "unlabelled", info)
    return examples


def report_bad_rows(source: Source, split: str, info: Callable[[str], None]) -> None:
    """Says which rows of a split were skipped."""
    for bad in source.bad[:5]:
        info(f"{split}: skipped {bad}")
    if len(source.bad) > 5:
        info(f"{split}: skipped {len(source.bad)} rows in all")


def prepare_splits(
    splits: Sequence[str],
    name: str,
    tokenizer: Any,
    labels: tuple[str, ...],
    settings: DataSettings,
    info=lambda text: None,
) -> dict[str, Prepared]:
    """Several splits of a task, encoded, whose padded batches have the same lengths and so share compiled programs."""
    by_split = {split: prepare(name, TASKS[name], tokenizer, labels, settings, split, info) for split in splits}
    examples = tuple(prepared.examples for prepared in by_split.values())
    return {split: prepared._replace(fitted_to=examples) for split, prepared in by_split.items()}


def batches_of(
    config: Any,
    task: Task,
    prepared: Prepared,
    tokenizer: Any,
    settings: DataSettings,
    batch_size: int,
    seed: int | None,
) -> Batches:
    """The batches of a split as a model reads them: its decoder begins with the token that it begins to write with."""
    return with_decoder_start(
        task.batches(prepared, tokenizer, settings, batch_size, seed), config.decoder_start_token_id
    )


def check_fit(config: Any, tokenizer: Any, data: DataSettings) -> None:
    """Raises ValueError when rows of tokens would reach beyond the model's tables (a lookup would not notice)."""
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size}
    if beyond:
        largest = max(beyond)
        raise ValueError(
            f"the tokenizer has {len(beyond)} tokens beyond the {config.vocab_size} rows of the model's table, the "
            f"last {beyond[largest]!r} with the id {largest}: use the model's own tokenizer (config.data.tokenizer), "
            f"take the tokens out of it, or for a fresh model set a larger config.model.vocab_size"
        )
    start = config.decoder_start_token_id
    if start is not None and start >= config.vocab_size:
        raise ValueError(f"decoder_start_token_id {start} is beyond the {config.vocab_size} rows of the model's table")
    if config.position_offset and padding_id(tokenizer) != config.pad_token_id:
        raise ValueError(
            f"the tokenizer pads with {padding_id(tokenizer)}, the model counts its positions over tokens that are not "
            f"{config.pad_token_id}; use the model's own tokenizer, or set its pad_token to that token"
        )
    if config.max_positions and data.max_length > config.max_positions:
        raise ValueError(
            f"config.data.max_length = {data.max_length}, but the model has {config.max_positions} positions; "
            f"shorten the rows, or for a fresh model raise config.model.max_positions"
        )


def check_types(config: Any, splits: Mapping[str, Prepared]) -> None:
    """Raises ValueError for token types beyond the model's table of them."""
    for split, prepared in splits.items():
        types = prepared.examples.columns.get("token_type_ids")
        largest = int(types.values.max(initial=0)) if isinstance(types, Ragged) else 0
        if config.type_vocab_size and largest >= config.type_vocab_size:
            raise ValueError(
                f"config.data.{split}: the tokenizer gives pairs the token type {largest}, the model knows "
                f"{config.type_vocab_size} (type_vocab_size); use the model's own tokenizer"
            )
