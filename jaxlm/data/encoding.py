"""Encoding of many texts at once, of which neither the characters nor the ids need to fit in memory."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm.data.disk_array import Growing
from jaxlm.data.ragged import Ragged, offsets_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHARACTERS = 1 << 20
"""Of text that is encoded at a time: enough to keep all cores busy; an encoding takes some 100 bytes a token."""
LONG = 1 << 16
"""Characters after which a text may be cut: one text is the work of one core, and all its encoding is in memory."""
WINDOW = 100
"""Characters on each side of a cut that are looked at."""
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?=\s\w)")


class Encoded(NamedTuple):
    """Encoded texts, row by row of equal lengths."""

    ids: Ragged
    types: Ragged  # 0 in the first text, 1 in the second of a pair
    words: Ragged  # number of the word whose first piece stands here, else -1
    bytes: Ragged  # of the text's UTF-8 that end with this token


def encode(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Iterable[str] | Iterable[tuple[str, str]] | Iterable[Sequence[str]],
    *,
    max_length: int | None = None,
    special_tokens: bool = True,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    words: bool = False,
    count_bytes: bool = False,
    chunk: int = 1024,
) -> Encoded:
    """Encodes texts, pairs of texts, or (``words=True``) sentences split in words, on all cores.

    The encodings of at most ``chunk`` texts, and of few more than a million characters, are in memory at a time; the
    result is mapped from files (see ``Growing``). A long text to which the tokenizer adds nothing, and that is not
    truncated, is encoded in pieces where that gives the same (see ``pieces``).

    Longer results are truncated to ``max_length`` as Hugging Face tokenizers do: the longer text of a pair first, the
    special tokens kept, on the side that ``tokenizer.truncation_side`` names. ``Encoded.words`` is only filled for
    words.

    Args:
      before, after: ids that begin and end every row, not counted by ``max_length``.
      count_bytes: of whole texts, fill ``Encoded.bytes``: every byte of a text belongs to one token of its row (of the
        tokens in one character to the first; what no token stands for to the next one, or the last of all). It takes
        longer.

    Raises:
      ValueError: for what is no text, or a ``max_length`` without room for any beside the special tokens.
    """
    assert not (count_bytes and (words or max_length is not None)), "the bytes of whole texts"
    backend = tokenizer.backend_tokenizer
    prefix = " " if words and _wants_leading_space(backend) else ""
    run = backend.encode_batch if words or count_bytes else backend.encode_batch_fast  # that forgets words and places
    whole = words or special_tokens or max_length is not None
    largest = max(tokenizer.get_vocab().values(), default=0)
    ids, types = Growing(np.uint16 if largest < 1 << 16 else np.int32), Growing(np.uint8)
    firsts, sizes = Growing(np.int32), Growing(np.int32)
    lengths, paired, begun = [np.empty(0, np.int64)], False, 0
    ends = bytearray([True])  # whether a text ends before the first piece, and behind every one

    def stream() -> Iterator[Any]:
        for text in texts:
            parts = [text] if whole or not isinstance(text, str) else pieces(backend, text)
            ends.extend([False] * (len(parts) - 1) + [True])
            yield from parts

    with _truncating(backend, max_length, tokenizer.truncation_side):
        for some in chunks(stream(), chunk):
            paired = paired or not isinstance(some[0], str)
            if max_length is not None:
                _check_room(backend, max_length, len(before) + len(after), special_tokens, paired and not words)
            if words:
                some = [[prefix + word for word in sentence] for sentence in some]
            try:
                encodings = run(some, is_pretokenized=words, add_special_tokens=special_tokens)
            except TypeError as error:
                raise ValueError(f"texts {begun} to {begun + len(some) - 1}: {_not_text(some)}") from error
            edges = pairwise(ends[begun : begun + len(some) + 1])
            begun += len(some)
            rows = [(before if a else (), e, after if b else ()) for (a, b), e in zip(edges, encodings, strict=True)]
            if count_bytes:
                for text, row in zip(some, rows, strict=True):
                    sizes.append(_row_bytes(text, *row))
            lengths.append(np.array([len(a) + len(e) + len(b) for a, e, b in rows], np.int64))
            ids.append(_joined(((a, e.ids, b) for a, e, b in rows), ids.dtype))
            if paired:
                types.append(_joined((([0] * len(a), e.type_ids, [0] * len(b)) for a, e, b in rows), types.dtype))
            if words:
                numbers = ((len(a) * [-1], _first_pieces(e.word_ids), len(b) * [-1]) for a, e, b in rows)
                firsts.append(_joined(numbers, firsts.dtype))
    offsets = offsets_of(np.concatenate(lengths))[np.frombuffer(ends, np.bool_)]
    type_ids = types.array() if paired else np.broadcast_to(np.uint8(0), offsets[-1])
    first = firsts.array() if words else np.broadcast_to(np.int32(-1), offsets[-1])
    counts = sizes.array() if count_bytes else np.broadcast_to(np.int32(0), offsets[-1])
    return Encoded(*(Ragged(values, offsets) for values in (ids.array(), type_ids, first, counts)))


def frame(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """The ids of the special tokens that the tokenizer puts before and after a text."""
    with _truncating(tokenizer.backend_tokenizer):
        encoding = tokenizer.backend_tokenizer.encode("a")
    own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    if not len(own):
        raise ValueError(
            "the tokenizer has no token for the letter a, so what it puts around a text cannot be told from the text; "
            "give it an unknown token, or train it on texts that have one (config.data.tokenizer)"
        )
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


def pieces(backend: Any, text: str) -> list[str]:
    """A text in pieces of at least ``LONG`` characters that give, one after the other, the ids of the whole.

    It is cut between two words, where the ``WINDOW`` on both sides gives the same ids in one and in two, some on either
    side: with a tokenizer that splits texts in words first, that is everywhere. Where the first few places do not, as
    with one that marks the beginning of a text, the rest stays whole.
    """
    cuts = [0]
    while cuts[-1] + LONG < len(text):
        places = (match.start() for match in islice(_BETWEEN_WORDS.finditer(text, cuts[-1] + LONG), 8))
        cut = next((place for place in places if _are_apart(backend, text, place)), None)
        if cut is None:
            break
        cuts.append(cut)
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])] if len(cuts) > 1 else [text]


def _are_apart(backend: Any, text: str, place: int) -> bool:
    left, right = text[max(place - WINDOW, 0) : place], text[place : place + WINDOW]
    one, other, both = backend.encode_batch_fast([left, right, left + right], add_special_tokens=False)
    return bool(one.ids and other.ids) and one.ids + other.ids == both.ids


def chunks(texts: Iterable, most: int) -> Iterator[list]:
    """The texts in lists of so many, or of a million characters if that is fewer."""
    some: list = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += sum(len(part) for part in _parts(text) if isinstance(part, str))
        if len(some) == most or characters >= CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _parts(text: Any) -> Sequence:
    """A text by itself, those of a pair, or words."""
    return text if isinstance(text, list | tuple) else (text,)


def _not_text(texts: list) -> str:
    """What stands among texts and is none."""
    parts = chain.from_iterable(map(_parts, texts))
    return next((f"{part!r} is {type(part).__name__}, not a string" for part in parts if not isinstance(part, str)), "")


def _joined(rows: Iterable[tuple[Sequence[int], ...]], dtype: np.dtype) -> np.ndarray:
    """The parts of all rows end to end."""
    return np.fromiter(chain.from_iterable(chain.from_iterable(rows)), dtype)


def _check_room(backend: Any, max_length: int, around: int, special_tokens: bool, pair: bool) -> None:
    """Raises ValueError where nothing of a text (or of each of two) fits beside the special tokens."""
    special = backend.num_special_tokens_to_add(pair) if special_tokens else 0
    if max_length < special + 1 + pair:
        raise ValueError(
            f"config.data.max_length = {max_length + around} leaves no room for {'two texts' if pair else 'text'} "
            f"beside {special + around} special tokens; make it at least {special + around + 1 + pair}"
        )


def _row_bytes(text: str, a: Sequence[int], e: Any, b: Sequence[int]) -> np.ndarray:
    """Bytes of every token of a row: of what stands before a text or a piece of one, of the encoding, and after it."""
    counts = np.zeros(len(a) + len(e) + len(b) + 1, np.int64)
    counts[len(a) : len(a) + len(e) + 1] = bytes_between(text, [end for _, end in e.offsets])
    counts[-2:-1] += counts[-1]  # what is left belongs to the last token, where none stands behind the text
    return counts[:-1]


def bytes_between(text: str, ends: Sequence[int]) -> np.ndarray:
    """UTF-8 bytes up to each of the ends, counted in characters, from the one before it; and behind the last.

    An end that lies before another's that came first counts as that.

    >>> bytes_between("né!", [1, 2, 2]).tolist()
    [1, 2, 0, 1]
    """
    places = np.maximum.accumulate([0, *ends, len(text)])
    if text.isascii():
        return np.diff(places)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = np.sum([codes >= first for first in (0, 0x80, 0x800, 0x10000)], axis=0)
    return np.diff(offsets_of(widths)[places])


def _first_pieces(word_ids: list[int | None]) -> list[int]:
    return [-1 if word is None or word == last else word for last, word in pairwise([None, *word_ids])]


def _wants_leading_space(backend: Any) -> bool:
    """Byte-level tokenizers mark a word's beginning by the space before it, which split words have lost."""
    parts = json.loads(backend.to_str())["pre_tokenizer"] or {}
    return any(
        part["type"] == "ByteLevel" and not part["add_prefix_space"]
        for part in parts.get("pretokenizers", [parts])
        if part
    )


@contextlib.contextmanager
def _truncating(backend: Any, max_length: int | None = None, side: str = "right") -> Iterator[None]:
    """Sets truncation and no padding, and restores what the tokenizer had."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_padding()
    if max_length is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(max(max_length, 0), direction=side)
    try:
        yield
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
