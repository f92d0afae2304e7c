"""Corruptions that make a training task of plain text: masked tokens, denoised spans, next-sentence pairs.

All randomness is a function of (seed, step), so a batch is the same whenever and on whatever host it is made.
"""

from array import array
from dataclasses import dataclass

import numpy as np

from jaxlm.data.disk_array import DiskArray
from jaxlm.data.loader import Batches, generator
from jaxlm.data.packing import IGNORED, Batch
from jaxlm.data.ragged import Examples, Ragged, offsets_of

_MASKING, _DENOISING = 1, 2  # part of the generator's key, so that two corruptions with one seed are independent


# -- masked language modelling (Devlin et al. 2019) -------------------------------------------------------------------


def mask_tokens(
    batches: Batches,
    seed: int,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: np.ndarray,
    probability: float = 0.15,
    masked: float = 0.8,
    randomized: float = 0.1,
) -> Batches:
    """Masked language modelling: selects tokens to predict and masks most of them.

    Every token that is neither padding nor one of ``special_ids`` is selected with ``probability``. Of the selected, a
    fraction ``masked`` becomes ``mask_id``, a fraction ``randomized`` a uniform non-special token, the rest is
    unchanged. Sets ``labels`` to the original token where selected, IGNORED elsewhere; other columns are unchanged.
    """
    if not 0 <= masked + randomized <= 1 or not 0 < probability < 1:
        raise ValueError(f"shares must lie in [0, 1]: probability={probability}, masked={masked}, random={randomized}")
    ordinary = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), special_ids)

    def mask(batch: Batch, step: int) -> Batch:
        ids = batch["input_ids"]
        random = generator(seed, step, _MASKING)
        selected = random.random(ids.shape) < probability
        draw = random.random(ids.shape)
        replacement = random.choice(ordinary, ids.shape)
        selected &= _is_token(batch) & ~np.isin(ids, special_ids)
        corrupted = np.where(draw < masked, np.int32(mask_id), np.where(draw < masked + randomized, replacement, ids))
        return batch | {
            "input_ids": np.where(selected, corrupted, ids).astype(np.int32),
            "labels": np.where(selected, ids, IGNORED).astype(np.int32),
        }

    return batches.map(mask)


def _is_token(batch: Batch) -> np.ndarray:
    """Which positions of a batch are not padding, bool [B, T]."""
    return batch["segment_ids"] > 0 if "segment_ids" in batch else batch["attention_mask"] > 0


# -- span denoising (Raffel et al. 2020) ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """Numbers of noise tokens and of noise spans in a text of ``length`` tokens, and the lengths that result."""

    length: int
    noise: int
    spans: int

    @property
    def input_length(self) -> int:
        """The tokens that are kept, one sentinel per span, and the end token."""
        return self.length - self.noise + self.spans + 1

    @property
    def target_length(self) -> int:
        """The noise tokens, one sentinel per span, and the end token."""
        return self.noise + self.spans + 1


def span_counts(length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> Spans:
    """T5's counts for a text of ``length`` >= 2 tokens: ``noise = round(length * noise_density)``, with at least one
    token of noise and one of text; ``spans = round(noise / mean_span)``, at least one, and at most one per token of
    noise or of text."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    return Spans(length, noise, min(max(round(noise / mean_span), 1), noise, length - noise))


def denoising_length(input_length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> Spans:
    """Counts of the longest text whose corrupted input fits ``input_length``: for 512, T5's 568 (targets of 114)."""
    length = 2
    if span_counts(length, noise_density, mean_span).input_length > input_length:
        raise ValueError(f"an input of {input_length} tokens has no room for a corrupted text; make it longer")
    while span_counts(length + 1, noise_density, mean_span).input_length <= input_length:
        length += 1
    return span_counts(length, noise_density, mean_span)


def noise_mask(random: np.random.Generator, rows: int, counts: Spans) -> np.ndarray:
    """bool [rows, length]: exactly ``noise`` times True, in ``spans`` runs; rows begin with text and end with noise."""
    kept = _partition(random, rows, counts.length - counts.noise, counts.spans)
    noise = _partition(random, rows, counts.noise, counts.spans)
    runs = np.stack([kept, noise], axis=2).reshape(rows, -1)
    kinds = np.tile([False, True], rows * counts.spans)
    return np.repeat(kinds, runs.ravel()).reshape(rows, counts.length)


def _partition(random: np.random.Generator, rows: int, total: int, parts: int) -> np.ndarray:
    """int [rows, parts]: ``total`` as a sum of positive parts, uniformly distributed."""
    cuts = np.zeros((rows, total - 1), bool)
    cuts[:, : parts - 1] = True
    cuts = random.permuted(cuts, axis=1)
    inner = np.nonzero(cuts)[1].reshape(rows, parts - 1) + 1
    edges = np.concatenate([np.zeros((rows, 1), int), inner, np.full((rows, 1), total)], axis=1)
    return np.diff(edges, axis=1)


def denoise_spans(
    batches: Batches,
    seed: int,
    *,
    sentinels: np.ndarray,
    end_id: int,
    pad_id: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> Batches:
    """Turns rows of text into span-denoising examples for an encoder and a decoder.

    Each noise span becomes a sentinel in the input; the target lists each sentinel with the tokens that it replaces;
    both end with ``end_id``. Full rows of ``length`` tokens give exactly ``span_counts(length)`` tokens, without
    padding. Rows may hold several documents, as in T5. The decoder starts from ``pad_id``, as T5's does;
    ``loader.with_decoder_start`` sets another start.

    Returns batches of ``input_ids``, ``attention_mask``, ``decoder_input_ids``, ``decoder_attention_mask``, ``labels``.
    """

    def denoise(batch: Batch, step: int) -> Batch:
        # Inputs and targets, for all rows of one size at a time.
        ids, sizes = batch["input_ids"], _is_token(batch).sum(axis=1)
        full = span_counts(ids.shape[1], noise_density, mean_span)
        if full.spans > len(sentinels):
            raise ValueError(f"rows of {ids.shape[1]} need {full.spans} sentinels, the vocabulary has {len(sentinels)}")
        random = generator(seed, step, _DENOISING)
        inputs = np.full((len(ids), full.input_length), pad_id, np.int32)
        targets = np.full((len(ids), full.target_length), IGNORED, np.int32)
        for size in np.unique(sizes[sizes >= 2]):  # nearly always the one full size
            rows = np.flatnonzero(sizes == size)
            counts = span_counts(int(size), noise_density, mean_span)
            noise = noise_mask(random, len(rows), counts)
            text = ids[rows, :size]
            inputs[rows, : counts.input_length] = _replace_runs(text, noise, counts.input_length, sentinels, end_id)
            targets[rows, : counts.target_length] = _replace_runs(text, ~noise, counts.target_length, sentinels, end_id)
        # The decoder reads the targets shifted by one; a row without text attends to one padding token.
        real = targets != IGNORED
        shifted = np.concatenate([np.full((len(ids), 1), pad_id), np.where(real, targets, pad_id)[:, :-1]], axis=1)
        input_sizes = [span_counts(int(n), noise_density, mean_span).input_length if n >= 2 else 1 for n in sizes]
        real[:, 0] = True
        return {
            "input_ids": inputs,
            "attention_mask": (np.arange(inputs.shape[1]) < np.array(input_sizes)[:, None]).astype(np.int32),
            "decoder_input_ids": shifted.astype(np.int32),
            "decoder_attention_mask": real.astype(np.int32),
            "labels": targets,
        }

    return batches.map(denoise)


def _replace_runs(text: np.ndarray, hidden: np.ndarray, length: int, sentinels: np.ndarray, end_id: int) -> np.ndarray:
    """int32 [rows, length]: each run of hidden tokens replaced by the next sentinel, and the end token at the end."""
    first = hidden & ~np.pad(hidden, ((0, 0), (1, 0)))[:, :-1]
    number = np.cumsum(first, axis=1) - 1
    shown = np.where(first, sentinels[np.maximum(number, 0)], text)[~hidden | first].reshape(len(text), length - 1)
    return np.pad(shown, ((0, 0), (0, 1)), constant_values=end_id).astype(np.int32)


# -- next-sentence pairs (Devlin et al. 2019) -------------------------------------------------------------------------


def next_sentence_pairs(
    sentences: Ragged, documents: np.ndarray, seed: int, *, max_length: int, first_id: int, between_id: int
) -> Examples:
    """Pairs of passages for next-sentence prediction: ``first A between B between`` of at most ``max_length`` tokens.

    A document is read in chunks that fill the row. A is the beginning of a chunk, up to a random sentence; B is, with
    equal probability, the rest of the chunk (label 0) or a passage of another document (label 1), in which case the
    next chunk begins with the unused rest. A pair that is too long loses tokens at random ends of the longer passage.

    Args:
      sentences: token ids of all sentences.
      documents: int64 [d + 1] offsets: document ``i`` has the sentences ``documents[i] .. documents[i + 1] - 1``.

    Returns columns ``input_ids`` and ``token_type_ids`` (ragged), ``next_sentence_labels`` int32 [n].
    """
    sizes = np.diff(documents)
    if max_length < 5:
        raise ValueError(
            f"config.data.max_length = {max_length} leaves no room for two passages beside 3 special tokens; "
            f"make it at least 5"
        )
    if (sizes > 0).sum() < 2:
        raise ValueError("next-sentence pairs need at least two documents, to take unrelated passages from")
    nonempty = np.flatnonzero(sizes)
    random = generator(seed)
    room = max_length - 3
    ids, types = DiskArray(sentences.values.dtype), DiskArray(np.uint8)
    lengths, labels = array("q"), array("i")
    for document in nonempty:
        position, end = int(documents[document]), int(documents[document + 1])
        while position < end:
            # A: the beginning of the chunk that ends with the sentence `stop - 1`.
            stop = _passage_end(sentences, position, end, room)
            split = position + 1 + int(random.integers(max(stop - position - 1, 1)))
            first = _tokens(sentences, position, split)
            # B: a passage of another document, or the rest of the chunk.
            unrelated = split >= stop or random.random() < 0.5
            if unrelated:
                source = document
                while source == document:
                    source = random.choice(nonempty)
                start = int(random.integers(documents[source], documents[source + 1]))
                limit = _passage_end(sentences, start, int(documents[source + 1]), max(room - len(first), 1))
                second = _tokens(sentences, start, limit)
                position = split
            else:
                second = _tokens(sentences, split, stop)
                position = stop
            first, second = _shorten(random, first, second, room)
            ids.append(np.concatenate([[first_id], first, [between_id], second, [between_id]]))
            types.append(np.repeat([0, 1], [len(first) + 2, len(second) + 1]))
            lengths.append(len(first) + len(second) + 3)
            labels.append(unrelated)
    offsets = offsets_of(np.array(lengths, np.int64))
    columns = {"input_ids": Ragged(ids.array(), offsets), "token_type_ids": Ragged(types.array(), offsets)}
    return Examples(columns | {"next_sentence_labels": np.array(labels, np.int32)})


def _passage_end(sentences: Ragged, start: int, end: int, room: int) -> int:
    """The sentence after a passage that begins with ``start`` and has at least ``room`` tokens, or ``end``."""
    reached = sentences.offsets[start + 1 : end + 1] - sentences.offsets[start] >= room
    return start + 1 + int(reached.argmax()) if reached.any() else end


def _tokens(sentences: Ragged, start: int, stop: int) -> np.ndarray:
    """Token ids of the sentences ``start .. stop - 1``."""
    return sentences.values[sentences.offsets[start] : sentences.offsets[stop]]


def _shorten(random: np.random.Generator, first: np.ndarray, second: np.ndarray, room: int) -> tuple:
    """Removes tokens from the longer passage, from random ends of it, until both fit ``room``."""
    sizes = [len(first), len(second)]
    while sum(sizes) > room:
        sizes[int(sizes[1] >= sizes[0])] -= 1
    shortened = []
    for passage, size in zip((first, second), sizes, strict=True):
        front = int(random.binomial(len(passage) - size, 0.5))
        shortened.append(passage[front : front + size])
    return tuple(shortened)
