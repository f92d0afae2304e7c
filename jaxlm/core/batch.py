"""What a network reads of a batch, and rows that are groups of texts."""

from collections.abc import Mapping
from typing import Any

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "segment_ids",
    "positions",
    "decoder_input_ids",
    "decoder_attention_mask",
)
"""What a forward pass reads of a batch; an evaluation keeps the other columns of it."""
OF_TEXTS = (*MODEL_INPUTS, "distill_mask")
"""Columns that say something of every text of a group; so do those whose names begin with ROWS."""
ROWS = "rows/"
"""What the names of the columns of a batch begin with that become `Context.rows`."""


def text_rows(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with a row a text: what stands a text as `[rows · group, …]`, the texts of a group one after the other.

    A row of a batch is a text, `input_ids [rows, length]`, or a group of texts that must stay together (a pair, a
    triple, a question with its choices), `input_ids [rows, group, length]`. Whatever deals out rows (batches,
    microbatches, devices, files) deals out whole groups and need not know of them; a network reads texts. What stands
    a row, `labels` above all, is as it was.

    >>> import numpy as np
    >>> batch = {"input_ids": np.zeros((2, 3, 8), int), "labels": np.zeros(2, int)}
    >>> {name: array.shape for name, array in text_rows(batch).items()}
    {'input_ids': (6, 8), 'labels': (2,)}
    """
    ids = batch.get("input_ids", batch.get("decoder_input_ids"))
    if ids is None or ids.ndim < 3:
        return batch
    of_texts = [name for name in batch if name in OF_TEXTS or name.startswith(ROWS)]
    return {**batch, **{name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in of_texts}}


def row_columns(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that every pass over its rows is given, also each step of decoding.

    >>> import numpy as np
    >>> row_columns({"input_ids": np.ones((2, 5)), "rows/adapter": np.array([0, 1])})
    {'rows/adapter': array([0, 1])}
    """
    return {name: array for name, array in batch.items() if name.startswith(ROWS)}
