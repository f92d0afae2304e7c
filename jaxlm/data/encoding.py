"""Tokenization of many texts at once; neither their characters nor their ids need to fit in memory."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm.data.disk_array import DiskArray
from jaxlm.data.ragged import Ragged, offsets_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHARACTERS = 1 << 20
"""Characters encoded at a time: enough to keep all cores busy; an encoding takes some 100 bytes per token."""
LONG = 1 << 16
"""Characters after which a text may be cut: one core encodes one text, and its whole encoding is in memory."""
WINDOW = 100
"""Characters on each side of a cut that are checked."""
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?=\s\w)")


class Encoded(NamedTuple):
    """Encoded texts: one row per text, with the same lengths in all columns.

    Attributes:
      ids: token ids.
      types: 0 in the first text, 1 in the second of a pair.
      words: number of the word of which the token is the first piece, else -1.
      bytes: UTF-8 bytes of the text that belong to the token.
    """

    ids: Ragged
    types: Ragged
    words: Ragged
    bytes: Ragged


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
    result is mapped from files (see ``DiskArray``). A long text that is encoded without special tokens and without
    truncation is encoded in pieces where that gives the same ids (see ``pieces``).

    Longer rows are truncated to ``max_length`` as Hugging Face tokenizers do: the longer text of a pair first, the
    special tokens kept, on the side ``tokenizer.truncation_side``. ``Encoded.words`` is filled for words only.

    Args:
      before, after: ids that begin and end every row, not counted by ``max_length``.
      count_bytes: fill ``Encoded.bytes``, for texts that are not truncated: every byte of a text belongs to one token
        of its row (a character of several tokens to the first of them; bytes without a token to the next token, or to
        the last of the row). It takes longer.

    Raises:
      ValueError: for an input that is not text, or a ``max_length`` without room for text beside the special tokens.
    """
    assert not (count_bytes and (words or max_length is not None)), "count_bytes is for texts that are not truncated"
    backend = tokenizer.backend_tokenizer
    prefix = " " if words and _wants_leading_space(backend) else ""
    encode_batch = backend.encode_batch if words or count_bytes else backend.encode_batch_fast  # no words, no offsets
    uncut = words or special_tokens or max_length is not None
    largest_id = max(tokenizer.get_vocab().values(), default=0)
    ids, types = DiskArray(np.uint16 if largest_id < 1 << 16 else np.int32), DiskArray(np.uint8)
    word_numbers, byte_counts = DiskArray(np.int32), DiskArray(np.int32)
    lengths, paired, encoded = [np.empty(0, np.int64)], False, 0
    text_ends = bytearray([True])  # whether a text ends before the first piece, and after every piece

    def stream() -> Iterator[Any]:
        for text in texts:
            parts = [text] if uncut or not isinstance(text, str) else pieces(backend, text)
            text_ends.extend([False] * (len(parts) - 1) + [True])
            yield from parts

    with _truncating(backend, max_length, tokenizer.truncation_side):
        for inputs in chunks(stream(), chunk):
            # Encode a chunk.
            paired = paired or not isinstance(inputs[0], str)
            if max_length is not None:
                _check_room(backend, max_length, len(before) + len(after), special_tokens, paired and not words)
            if words:
                inputs = [[prefix + word for word in sentence] for sentence in inputs]
            try:
                encodings = encode_batch(inputs, is_pretokenized=words, add_special_tokens=special_tokens)
            except TypeError as error:
                raise ValueError(f"texts {encoded} to {encoded + len(inputs) - 1}: {_not_text(inputs)}") from error
            # The first piece of a text begins with `before`, and the last ends with `after`.
            edges = pairwise(text_ends[encoded : encoded + len(inputs) + 1])
            encoded += len(inputs)
            rows = [(before if a else (), e, after if b else ()) for (a, b), e in zip(edges, encodings, strict=True)]
            # Append the rows to the columns.
            lengths.append(np.array([len(a) + len(e) + len(b) for a, e, b in rows], np.int64))
            ids.append(_joined(((a, e.ids, b) for a, e, b in rows), ids.dtype))
            if count_bytes:
                for text, row in zip(inputs, rows, strict=True):
                    byte_counts.append(_row_bytes(text, *row))
            if paired:
                types.append(_joined((([0] * len(a), e.type_ids, [0] * len(b)) for a, e, b in rows), types.dtype))
            if words:
                numbers = ((len(a) * [-1], _first_pieces(e.word_ids), len(b) * [-1]) for a, e, b in rows)
                word_numbers.append(_joined(numbers, word_numbers.dtype))
    # Columns that were not filled are one value, broadcast.
    offsets = offsets_of(np.concatenate(lengths))[np.frombuffer(text_ends, np.bool_)]
    columns = (
        ids.array(),
        types.array() if paired else np.broadcast_to(np.uint8(0), offsets[-1]),
        word_numbers.array() if words else np.broadcast_to(np.int32(-1), offsets[-1]),
        byte_counts.array() if count_bytes else np.broadcast_to(np.int32(0), offsets[-1]),
    )
    return Encoded(*(Ragged(values, offsets) for values in columns))


def special_tokens_around(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """The ids of the special tokens that the tokenizer puts before and after a text."""
    with _truncating(tokenizer.backend_tokenizer):
        encoding = tokenizer.backend_tokenizer.encode("a")
    text_tokens = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    if not len(text_tokens):
        raise ValueError(
            "the tokenizer has no token for the letter a, so its special tokens around a text cannot be told from the "
            "text; give it an unknown token, or train it on texts that have one (config.data.tokenizer)"
        )
    return encoding.ids[: text_tokens[0]], encoding.ids[text_tokens[-1] + 1 :]


def pieces(backend: Any, text: str) -> list[str]:
    """A text in pieces of at least ``LONG`` characters whose ids, concatenated, are those of the whole text.

    It is cut between two words, if the ``WINDOW`` on both sides has the same ids encoded as one text and as two, and
    neither side is empty: with a tokenizer that splits texts in words first, that holds everywhere. Where the first few
    candidates fail, as with a tokenizer that marks the beginning of a text, the rest stays whole.
    """
    cuts = [0]
    while cuts[-1] + LONG < len(text):
        candidates = (match.start() for match in islice(_BETWEEN_WORDS.finditer(text, cuts[-1] + LONG), 8))
        cut = next((position for position in candidates if _can_cut(backend, text, position)), None)
        if cut is None:
            break
        cuts.append(cut)
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])] if len(cuts) > 1 else [text]


def _can_cut(backend: Any, text: str, position: int) -> bool:
    """Whether the text around a position has the same ids as one text and as two."""
    left, right = text[max(position - WINDOW, 0) : position], text[position : position + WINDOW]
    encodings = backend.encode_batch_fast([left, right, left + right], add_special_tokens=False)
    left_ids, right_ids, both_ids = (encoding.ids for encoding in encodings)
    return bool(left_ids and right_ids) and left_ids + right_ids == both_ids


def chunks(texts: Iterable, most: int) -> Iterator[list]:
    """The texts in lists of ``most``, or of fewer with ``CHARACTERS`` characters."""
    chunk: list = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += sum(len(part) for part in _parts(text) if isinstance(part, str))
        if len(chunk) == most or characters >= CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _parts(text: Any) -> Sequence:
    """A single text, the two of a pair, or the words of a sentence."""
    return text if isinstance(text, list | tuple) else (text,)


def _not_text(texts: list) -> str:
    """Names the first input that is not a string."""
    parts = chain.from_iterable(map(_parts, texts))
    return next((f"{part!r} is {type(part).__name__}, not a string" for part in parts if not isinstance(part, str)), "")


def _joined(rows: Iterable[tuple[Sequence[int], ...]], dtype: np.dtype) -> np.ndarray:
    """The parts of all rows, concatenated."""
    return np.fromiter(chain.from_iterable(chain.from_iterable(rows)), dtype)


def _check_room(backend: Any, max_length: int, added: int, special_tokens: bool, pair: bool) -> None:
    """Raises ValueError if not one token of a text (or of each of two) fits beside the special and `added` tokens."""
    special = backend.num_special_tokens_to_add(pair) if special_tokens else 0
    if max_length < special + 1 + pair:
        raise ValueError(
            f"config.data.max_length = {max_length + added} leaves no room for {'two texts' if pair else 'text'} "
            f"beside {special + added} special tokens; make it at least {special + added + 1 + pair}"
        )


def _row_bytes(text: str, before: Sequence[int], encoding: Any, after: Sequence[int]) -> np.ndarray:
    """Bytes of every token of a row: int64 `[len(before) + len(encoding) + len(after)]`."""
    counts = np.zeros(len(before) + len(encoding) + len(after) + 1, np.int64)
    text_ends = [end for _, end in encoding.offsets]
    counts[len(before) : len(before) + len(encoding) + 1] = bytes_between(text, text_ends)
    counts[-2:-1] += counts[-1]  # bytes left where no token follows the text belong to its last token
    return counts[:-1]


def bytes_between(text: str, ends: Sequence[int]) -> np.ndarray:
    """UTF-8 bytes between consecutive ends (which are counted in characters), and those after the last.

    An end that lies before an earlier one of the list counts as that one.

    >>> bytes_between("né!", [1, 2, 2]).tolist()
    [1, 2, 0, 1]
    """
    boundaries = np.maximum.accumulate([0, *ends, len(text)])
    if text.isascii():
        return np.diff(boundaries)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = np.sum([codes >= first for first in (0, 0x80, 0x800, 0x10000)], axis=0)
    return np.diff(offsets_of(widths)[boundaries])


def _first_pieces(word_ids: list[int | None]) -> list[int]:
    """The number of the word at its first piece, -1 at all other tokens."""
    return [-1 if word is None or word == last else word for last, word in pairwise([None, *word_ids])]


def _wants_leading_space(backend: Any) -> bool:
    """Whether words need a space before them: byte-level tokenizers mark the beginning of a word by it."""
    parts = json.loads(backend.to_str())["pre_tokenizer"] or {}
    return any(
        part["type"] == "ByteLevel" and not part["add_prefix_space"]
        for part in parts.get("pretokenizers", [parts])
        if part
    )


@contextlib.contextmanager
def _truncating(backend: Any, max_length: int | None = None, side: str = "right") -> Iterator[None]:
    """Sets truncation and no padding, and restores the tokenizer's settings afterwards."""
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
