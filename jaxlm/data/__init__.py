"""From files to batches: sources -> records -> tokenizer -> Examples -> batches, a pure function of (seed, step).

Importing it imports numpy only; functions that need a larger library import it when they are called.
"""

from jaxlm.data.corruption import denoise_spans, denoising_length, mask_tokens, next_sentence_pairs
from jaxlm.data.encoding import Encoded, encode
from jaxlm.data.loader import Batches, bucketed, fitted, in_order, packed, packed_examples
from jaxlm.data.packing import IGNORED, Batch
from jaxlm.data.prefetch import prefetch
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.sources import BadRow, BadRowError, Source, read
from jaxlm.data.tokenizer import load_tokenizer, padding_id, sentinel_ids

__all__ = [
    "IGNORED",
    "BadRow",
    "BadRowError",
    "Batch",
    "Batches",
    "Encoded",
    "Examples",
    "Ragged",
    "Source",
    "bucketed",
    "denoise_spans",
    "denoising_length",
    "encode",
    "fitted",
    "in_order",
    "load_tokenizer",
    "mask_tokens",
    "next_sentence_pairs",
    "packed",
    "packed_examples",
    "padding_id",
    "prefetch",
    "read",
    "sentinel_ids",
]
