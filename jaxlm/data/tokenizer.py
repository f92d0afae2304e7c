"""Tokenizers: any Hugging Face fast tokenizer, or one trained on the data.

Training is deterministic: the same texts give the same vocabulary with the same ids.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxlm.data.sources import Source
from jaxlm.data.sources.locations import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED = ("bpe", "wordpiece", "character")
END = "<|endoftext|>"
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Texts:
    """All texts of all records, in any column, read again on every pass: what a tokenizer is trained on."""

    source: Source

    def __iter__(self) -> Iterator[str]:
        for record in self.source:
            for name in ("text", "text_pair", "source", "target"):
                if isinstance(record.get(name), str):  # rows with other values are reported by the task
                    yield record[name]
            words = record.get("tokens")
            if isinstance(words, list):
                # As words are encoded: each after a space.
                yield " " + " ".join(word for word in words if isinstance(word, str))


def load_tokenizer(spec: str, texts: Iterable[str] | None = None, *, sentinels: int = 0) -> "PreTrainedTokenizerFast":
    """A fast tokenizer from a directory, from the Hugging Face hub, or trained on ``texts``.

    Args:
      spec: a directory or hub id, or what to train: ``"bpe:4096"`` (bytes, so nothing is unknown; ``<|endoftext|>``
        begins and ends documents), ``"wordpiece:8000"`` (BERT's uncased form with [CLS] and [SEP]) or ``"character"``.
        The number is the size of the whole vocabulary.
      texts: the texts to train on. Every pass of the training iterates over them again, so they need not fit in
        memory, and must not be an iterator, which can be read only once.
      sentinels: number of ``<extra_id_0>``, ``<extra_id_1>``, .. in a trained vocabulary, for span denoising.

    Raises:
      ValueError: a malformed spec, a size too small for the alphabet, texts missing or empty, a slow tokenizer.
      OSError: no such directory, and the hub has no such tokenizer or is not reachable.
    """
    kind, _, size = spec.partition(":")
    if os.path.isdir(spec) or (kind not in TRAINED and ":" not in spec):
        return _pretrained(spec)
    if kind not in TRAINED:
        raise ValueError(f"tokenizer {spec!r}: cannot train a {kind!r}; {nearest(kind, TRAINED)}")
    if (kind == "character") != (not size) or (size and not size.isdecimal()):
        raise ValueError(f"tokenizer {spec!r}: write 'bpe:SIZE', 'wordpiece:SIZE' or 'character'")
    if isinstance(texts, Iterator):
        raise ValueError(f"tokenizer {spec!r}: training reads the texts several times; give a list, not an iterator")
    if texts is None or not any(texts):
        raise ValueError(f"tokenizer {spec!r} is trained on the training data and needs texts, but there are none")
    extra = [f"<extra_id_{i}>" for i in range(sentinels)]
    if kind == "bpe":
        return _train_bpe(texts, int(size), extra)
    if kind == "wordpiece":
        return _train_wordpiece(texts, int(size), extra)
    return _train_character(texts, extra)


def _pretrained(spec: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    if not os.path.isdir(spec) and (spec.count("/") > 1 or spec.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"tokenizer directory {spec!r} does not exist (working directory {os.getcwd()!r})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # the hub client raises many kinds, most of them about the network
        problem = "has no readable tokenizer" if os.path.isdir(spec) else "is no directory, and not read from the hub"
        raise OSError(f"tokenizer {spec!r} {problem}: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {spec!r} has no fast version (tokenizer.json); only fast tokenizers are used")
    return cast("PreTrainedTokenizerFast", tokenizer)


def _train_bpe(texts: Iterable[str], size: int, extra: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [END, "<|pad|>", *extra]
    _check_size(size, len(special) + 256, "bpe: 256 bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, extra, bos_token=END, eos_token=END, pad_token="<|pad|>")


def _train_wordpiece(texts: Iterable[str], size: int, extra: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    def tokenizer_of(vocabulary: dict[str, int]) -> Any:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    def train(special: list[str], vocab_size: int) -> list[str]:
        tokenizer = tokenizer_of({})
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        vocabulary = tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    # The trainer breaks ties among rare characters, and numbers the pieces "##x", in the order of a hash table. To be
    # deterministic, the alphabet (the most frequent characters) and the order of these pieces are passed to it.
    normalize = normalizers.BertNormalizer(lowercase=True).normalize_str
    counts = Counter(chain.from_iterable(map(normalize, texts)))
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(ranked[: max(size // 4, 64)])
    special = [*_BERT, *extra]
    pieces = sorted(token for token in train(special, 0) if token.startswith("##") and len(token) == 3)
    _check_size(size, len(special) + len(alphabet) + len(pieces), "wordpiece: the alphabet and the special tokens")
    learned = train([*special, *alphabet, *pieces], size)
    # The tokenizer of this vocabulary, with BERT's template.
    tokenizer = tokenizer_of({token: i for i, token in enumerate(learned)})
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, learned.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in _BERT}
    return _wrap(tokenizer, extra, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)


def _train_character(texts: Iterable[str], extra: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models

    special = [END, "<|pad|>", "<|unknown|>", *extra]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(set(chain.from_iterable(texts)))])}
    # BPE without merges splits into characters, eight times faster than a word model after a regular expression.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unknown|>"))
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, extra, bos_token=END, eos_token=END, pad_token="<|pad|>", unk_token="<|unknown|>")


def _check_size(size: int, least: int, what: str) -> None:
    if size < least:
        raise ValueError(f"a vocabulary of {size} is too small: at least {least} for {what}")


def _wrap(tokenizer: Any, extra: list[str], **names: Any) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    sentinels = {"additional_special_tokens": extra} if extra else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=10**9, **names, **sentinels
    )


def sentinel_ids(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """int32 ids of ``<extra_id_0>``, ``<extra_id_1>``, ..; ValueError if the vocabulary has none."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    if not ids:
        raise ValueError("the vocabulary has no sentinel <extra_id_0>: use a T5 tokenizer, or train one with sentinels")
    return np.array(ids, np.int32)


def padding_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The id to pad with: that of the end token without a padding token (GPT-2), as padding is masked anyway."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)
