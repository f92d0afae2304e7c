"""Vocabulary trimming: the rows of tokens that a corpus never uses, and the tokens themselves, go.

The tokenizer is rebuilt from the parts of the old one that the corpus needs, and splits the corpus into the same
pieces. Tables of tokens are most of a small model, so this is often the largest saving that costs nothing.
"""

import copy
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any, Protocol

import numpy as np

from jaxlm.core import LM, NO_DATA, Site, SurgeryContext, flatten, unflatten
from jaxlm.methods.prune.structured.slicing import cut

CHUNK = 1024
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""Pieces that tokenizers with byte fallback spell unknown characters with."""


def trim_vocabulary(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    split: str = "train",
    alphabet: bool = True,
) -> LM:
    """Surgery: keeps the tokens that a split of the data uses, their rows, and a tokenizer of them.

    Special and added tokens stay, and so do the pieces of one character, so that other text is still spelled. The
    logits of the tokens that stay are what they were. Trim a teacher too (it loses nothing) before a student learns
    from it: distillation compares token by token.

    Source: Abdaoui et al. 2020, arXiv:2010.05609.

    When: tables of tokens are most of the model, and the texts use few of their rows.

    Args:
      split: of `config.data`, the corpus.
      alphabet: keep all pieces of one character, also those that the corpus lacks.

    Raises:
      ValueError: no texts, no tokenizer or one of a kind that cannot be trimmed, or (should it ever come to that) a
        text that the trimmed tokenizer splits otherwise.
    """
    texts = context.texts(split)  # first: a context without texts is that of a dry run, which has no tokenizer either
    tokenizer, config = lm.tokenizer, lm.config
    if tokenizer is None:
        raise ValueError("trim_vocabulary: the model has no tokenizer, and it is the tokenizer that is trimmed")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    used = used_ids(tokenizer, texts)
    if not used:
        raise ValueError(f"trim_vocabulary: the split {split!r} has no text; name one that config.data has")

    # Ids that the model needs besides.
    used |= {i for i in tokenizer.all_special_ids if i is not None}
    if config.position_offset and config.pad_token_id is not None:  # RoBERTa counts positions from the padding's id
        used |= set(range(config.pad_token_id + 1))
    used |= {i for i in (config.pad_token_id, config.decoder_start_token_id) if i is not None}
    used = {i for i in used if i < config.vocab_size}

    kept, state = trimmed(state, used, alphabet)
    small = rebuilt(tokenizer, state)
    check_same(tokenizer, small, kept, context.texts(split))

    # The rows of the ids that stay, and their numbers in the config.
    flat, sizes = flatten(lm.params), lm.network.sizes()
    for path, leaf in flat.items():
        if not isinstance(leaf, Site) and "vocab" in lm.axes[path]:
            flat[path] = cut(leaf, lm.axes[path], sizes.get(path), {"vocab": np.array(kept)}, path)
    new_id = new_ids(kept)
    ids = {
        name: new_id[getattr(config, name)]
        for name in ("pad_token_id", "decoder_start_token_id")
        if getattr(config, name) is not None
    }
    config = config.replace(vocab_size=len(kept), **ids)
    return lm.replace(config=config, params=unflatten(flat)).with_tokenizer(small)


def used_ids(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Ids of all tokens of the texts."""
    backend, ids = plain(tokenizer), set()
    for chunk in chunks(texts):
        for encoding in backend.encode_batch_fast(chunk):
            ids.update(encoding.ids)
    return ids


def new_ids(kept: Iterable[int]) -> dict[int, int]:
    """By old id that stays, in order, the new one."""
    return {old: new for new, old in enumerate(kept)}


def plain(tokenizer: Any) -> Any:
    """A copy of the tokenizers.Tokenizer that neither truncates nor pads."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of `CHUNK` texts."""
    remaining = iter(texts)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


# The parts of a tokenizer ---------------------------------------------------------------------------------------------


def trimmed(state: Mapping[str, Any], used: Collection[int], alphabet: bool) -> tuple[list[int], dict[str, Any]]:
    """The old ids that stay, in order (see `new_ids`), and the tokenizer's JSON of those alone.

    Args:
      state: what `tokenizers.Tokenizer.to_str` writes; used: ids that must stay.

    Raises:
      ValueError: a kind of tokenizer that cannot be trimmed.
    """
    kind = state["model"].get("type")
    if kind not in KINDS:
        raise ValueError(f"a {kind} tokenizer cannot be trimmed; known: {', '.join(KINDS)}")
    model = state["model"]
    pieces = (
        dict(enumerate(piece for piece, _ in model["vocab"]))
        if kind == "Unigram"
        else {i: piece for piece, i in model["vocab"].items()}
    )

    # Which ids stay.
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    keep = {i for i in used if i in pieces or i in added} | set(added)
    keep |= {i for i, piece in pieces.items() if piece in BYTES or piece == model.get("unk_token")}
    if alphabet:
        prefix = model.get("continuing_subword_prefix") or ""
        keep |= {i for i, piece in pieces.items() if len(piece.removeprefix(prefix)) == 1}
    keep |= KINDS[kind](model, pieces, keep)
    kept = sorted(keep)
    new_id = new_ids(kept)

    # The vocabulary, the merges and the post-processor of those alone.
    small = copy.deepcopy(dict(state))
    kept_pieces = {pieces[i] for i in kept if i in pieces}
    if kind == "Unigram":
        small["model"]["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        if model.get("unk_id") is not None:
            small["model"]["unk_id"] = new_id[model["unk_id"]]
    else:
        small["model"]["vocab"] = {pieces[i]: new_id[i] for i in kept if i in pieces}
    if kind == "BPE":
        halves = [pair(merge) for merge in model["merges"]]
        small["model"]["merges"] = [[a, b] for a, b in halves if kept_pieces.issuperset((a, b, a + b))]
    for token in small["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber(small["post_processor"], new_id)
    return kept, small


class AlsoKept(Protocol):
    """What a kind of tokenizer needs besides the pieces that are used."""

    def __call__(self, model: Mapping[str, Any], pieces: Mapping[int, str], keep: Collection[int], /) -> set[int]:
        """Ids that must stay too.

        Args:
          model: the model of the tokenizer's JSON; pieces: by id.
          keep: ids that stay.
        """


def _word_pieces(model: Mapping[str, Any], pieces: Mapping[int, str], keep: Collection[int]) -> set[int]:
    """The longest piece that fits is taken, so pieces that were never taken do not matter."""
    return set()


def _unigram(model: Mapping[str, Any], pieces: Mapping[int, str], keep: Collection[int]) -> set[int]:
    """The best path stays the best without the rest. An unknown character costs what the worst piece costs: keep it."""
    scores = [score for _, score in model["vocab"]]
    unknown = {model["unk_id"]} if model.get("unk_id") is not None else set()
    return unknown | {int(np.argmin(scores))}


def _bpe(model: Mapping[str, Any], pieces: Mapping[int, str], keep: Collection[int]) -> set[int]:
    """What the kept pieces are merged from. Merges that none of them needs never happen in the corpus."""
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("a BPE tokenizer whose pieces mark the inside or the end of a word cannot be trimmed")
    ranks, ids = merge_ranks(model), {piece: i for i, piece in pieces.items()}
    parts: set[int] = set()
    for i in keep:
        if i in pieces:
            parts |= {ids[part] for left, right in merges_of(pieces[i], ranks) for part in (left, right, left + right)}
    return parts


KINDS: dict[str, AlsoKept] = {
    "WordPiece": _word_pieces,
    "WordLevel": _word_pieces,
    "Unigram": _unigram,
    "BPE": _bpe,
}
"""What must stay besides the pieces that are used, by the kind of model."""


def pair(merge: Any) -> tuple[str, str]:
    """Both halves of a merge, which files spell in two ways.

    >>> pair("a b"), pair(["a", "b"])
    (('a', 'b'), ('a', 'b'))
    """
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def merge_ranks(model: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Rank of every merge."""
    return {pair(merge): rank for rank, merge in enumerate(model["merges"])}


def merges_of(piece: str, ranks: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that make a piece out of its characters, in order: always the one of lowest rank, the leftmost first.

    What surrounds a piece in a text does not change them: a merge across its border would never be undone.

    >>> merges_of("abab", {("a", "b"): 0, ("ab", "ab"): 1})
    [('a', 'b'), ('a', 'b'), ('ab', 'ab')]
    """
    parts = list(piece)
    done: list[tuple[str, str]] = []
    while True:
        pairs = list(pairwise(parts))
        ranked = [(ranks[both], i) for i, both in enumerate(pairs) if both in ranks]
        if not ranked:
            return done
        _, i = min(ranked)
        done.append(pairs[i])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _renumber(part: Any, new_id: Mapping[int, int]) -> None:
    """New ids in a post-processor, in place: `"ids": [101]` of templates, `"sep": ["[SEP]", 102]` of BERT's."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "ids":
                part[key] = [new_id[i] for i in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                part[key] = [value[0], new_id[value[1]]]
            else:
                _renumber(value, new_id)
    elif isinstance(part, list):
        for value in part:
            _renumber(value, new_id)


def rebuilt(tokenizer: Any, state: Mapping[str, Any]) -> Any:
    """The same transformers tokenizer with another `tokenizers.Tokenizer` inside, of this JSON."""
    small = copy.deepcopy(tokenizer)
    small._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return small


def check_same(tokenizer: Any, small: Any, kept: list[int], texts: Iterable[str]) -> None:
    """Raises ValueError for a text that the trimmed tokenizer splits into other pieces."""
    before, after, new_id = plain(tokenizer), plain(small), new_ids(kept)
    for chunk in chunks(texts):
        encoded = zip(chunk, before.encode_batch_fast(chunk), after.encode_batch_fast(chunk), strict=True)
        for text, a, b in encoded:
            if [new_id[i] for i in a.ids] != b.ids:
                raise ValueError(f"trim_vocabulary: the trimmed tokenizer splits {text[:80]!r} otherwise")
