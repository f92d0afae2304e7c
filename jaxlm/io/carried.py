"""What a model directory says besides its network, and what goes on from the model that is read to the one written.

Only what is listed here is carried: an entry that names code to load (`auto_map`) does not reach an export.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

CONFIG_KEYS = (
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
"""Entries of config.json that say nothing about the network."""
GENERATION = "generation"
"""Under this name the entries of generation_config.json are carried beside those of config.json."""
GENERATION_FILE = "generation_config.json"
GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *(
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "num_return_sequences",
    ),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "guidance_scale"),
    *("penalty_alpha", "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values", "use_cache"),
)
"""Entries of generation_config.json that say how a model writes."""
_IDS = re.compile(r".*_token_id|suppress_tokens|begin_suppress_tokens|bad_words_ids")


def carried_of(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is carried of the contents of config.json and generation_config.json.

    >>> carried_of({"eos_token_id": [2, 5], "auto_map": {"AutoModel": "x.py"}}, {"top_k": 5, "custom_generate": "x"})
    {'eos_token_id': [2, 5], 'generation': {'top_k': 5}}

    Raises:
      ValueError: for an id that is no whole number, or no list of them.
    """
    carried = _listed(config, CONFIG_KEYS)
    if generation is not None:
        carried[GENERATION] = _listed(generation, GENERATION_KEYS)
    return carried


def _listed(entries: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    listed = {key: entries[key] for key in keys if entries.get(key) is not None}
    for key, value in listed.items():
        if _IDS.fullmatch(key) and not _are_ids(value):
            raise ValueError(f"{key}: expected an id of a token, or a list of them, found {value!r}")
    return listed


def _are_ids(value: Any) -> bool:
    return all(map(_are_ids, value)) if isinstance(value, list) else type(value) is int


def renumbered(carried: Mapping[str, Any], number: Callable[[int], int | None]) -> dict[str, Any]:
    """What is carried, for another vocabulary: every id becomes `number(id)`; what has none there goes.

    >>> renumbered({"eos_token_id": [2, 5], "bos_token_id": 7, "generation": {"eos_token_id": 5}}, {2: 0, 5: 1}.get)
    {'eos_token_id': [0, 1], 'generation': {'eos_token_id': 1}}
    """

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [new_id for new_id in map(of, value) if new_id is not None]
        return number(value)

    new: dict[str, Any] = {}
    for key, value in carried.items():
        if key == GENERATION:
            new[key] = renumbered(value, number)
        elif not _IDS.fullmatch(key):
            new[key] = value
        elif (ids := of(value)) not in (None, []):
            new[key] = ids
    return new


def for_tokenizer(carried: Mapping[str, Any], before: Any, now: Any) -> dict[str, Any]:
    """What is carried, for a tokenizer (of transformers) that took the place of another, and with its special tokens.

    Where both know a token its ids are exchanged. The ids that a config names of its own win over those of the
    tokenizer's, which knows a single end token.
    """
    if before is not None and now is not before and now.get_vocab() != before.get_vocab():
        vocabulary = now.get_vocab()
        # Below 0 is how some files say that there is none.
        carried = renumbered(carried, lambda i: vocabulary.get(before.convert_ids_to_tokens(i)) if i >= 0 else None)
    names = [key for key in CONFIG_KEYS if key.endswith("_token_id")]
    return {name: getattr(now, name) for name in names if getattr(now, name, None) is not None} | dict(carried)
