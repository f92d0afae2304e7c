"""A teacher's answers on disk: its top k logits and full logsumexp at every position that training asks about.

A cache is a table from the content of a row to the teacher's answers in it, so it serves whatever order, batch size or
epoch the rows come in; of rows that a seed draws anew (packing, masking) it has those of the seed it was written with.
A directory holds `rows.array_record` (a record a row), `index.npy` (the rows' digests, in order) and `cache.json` (what
it was made of, its layout and sizes).
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxlm.core.extras import require
from jaxlm.data.loader import Batches
from jaxlm.data.packing import Batch, counted

DTYPES = ("float16", "float32")
Answers = Mapping[str, np.ndarray]
"""`ids`, `logits` `[batch, (length,) top_k]` and `logsumexp` `[batch, (length,) temperatures]`."""


@dataclass(frozen=True)
class CacheSettings:
    """Where a teacher's answers are kept, and how many of them.

    Attributes:
      directory: of the cache; written by the first run that finds nothing there.
      top_k: answers a position (all, where there are fewer).
      temperatures: of which the logsumexp is kept, besides 1 and that of the config.
      dtype: of the logits, `float16` or `float32`.
    """

    directory: str
    top_k: int = 64
    temperatures: Sequence[float] = ()
    dtype: str = "float16"

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"cache: top_k = {self.top_k} keeps no answer; 64 is usual")
        if self.dtype not in DTYPES:
            raise ValueError(f"cache: dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if any(t <= 0 for t in self.temperatures):
            raise ValueError(f"cache: temperatures must be positive, not {tuple(self.temperatures)}")


@dataclass(frozen=True)
class Layout:
    """How a position's answers lie in a record: ids, logits, logsumexps.

    Attributes:
      top_k, temperatures, dtype: as in CacheSettings; the first temperature is 1.
      classes: number of outputs among which the answers are.
    """

    top_k: int
    temperatures: tuple[float, ...]
    dtype: str
    classes: int

    @property
    def record(self) -> np.dtype:
        """Of one position."""
        ids = np.uint16 if self.classes <= 1 << 16 else np.uint32
        k, temperatures = (self.top_k,), (len(self.temperatures),)
        return np.dtype([("ids", ids, k), ("logits", self.dtype, k), ("logsumexp", np.float32, temperatures)])


def answered(batch: Batch) -> Bool[np.ndarray, "batch *length"]:
    """The distillation mask: where a label counts, or the column `distill_mask`."""
    return batch["distill_mask"] > 0 if "distill_mask" in batch else counted(batch["labels"])


def row_digests(batch: Batch) -> list[bytes]:
    """A digest of every row's content without its padding; equal for equal rows, however long their batch is."""
    lengths = {side: _lengths(batch, side) for side in ("", "decoder_")}
    decoder = lengths["decoder_"] is not None
    digests = []
    for row in range(len(batch["input_ids"])):
        digest = blake2b(digest_size=16)
        for name in sorted(batch):
            value = batch[name][row]
            side = "decoder_" if decoder and (name.startswith("decoder_") or name == "labels") else ""
            ends = lengths[side]
            if value.ndim and ends is not None:
                value = value[: ends[row]]
            digest.update(f"{name} {value.dtype.str} {value.shape};".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        digests.append(digest.digest())
    return digests


def _lengths(batch: Batch, side: str) -> Int[np.ndarray, "batch"] | None:
    """Tokens of every row up to its last real one."""
    mask = batch.get(f"{side}segment_ids", batch.get(f"{side}attention_mask"))
    if mask is None:
        return None
    return mask.shape[1] - np.argmax(mask[:, ::-1] > 0, axis=1)


# -- reading ----------------------------------------------------------------------------------------------------------


class Cache:
    """The cache in a directory.

    Raises:
      FileNotFoundError: when there is none.
    """

    def __init__(self, directory: Path):
        require("array_record", "teacher-cache")
        self.directory = directory
        if not (directory / "cache.json").exists():
            raise FileNotFoundError(
                f"{directory} holds no teacher's answers (cache.json); name the teacher to write them"
            )
        about = json.loads((directory / "cache.json").read_text())
        self.fingerprint: dict[str, Any] = about["fingerprint"]
        layout = about["layout"]
        self.layout = Layout(**{**layout, "temperatures": tuple(layout["temperatures"])})
        self.made_for: dict[str, int] = about["made_for"]
        self.facts: dict[str, Any] = about["facts"]

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {digest.tobytes(): i for i, digest in enumerate(np.load(self.directory / "index.npy"))}

    @cached_property
    def _reader(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        options = "readahead_buffer_size:0,max_parallelism:0"  # rows are read one by one, in any order
        return ArrayRecordReader(str(self.directory / "rows.array_record"), options)

    def check_same(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises ValueError when the cache was made of something else, naming what."""
        asked_for = json.loads(json.dumps(fingerprint))
        changed = [name for name in asked_for if self.fingerprint.get(name) != asked_for[name]]
        if changed:
            changes = "; ".join(
                f"{name}: {_short(self.fingerprint.get(name))} there, {_short(asked_for[name])} now" for name in changed
            )
            raise ValueError(
                f"the answers in {self.directory} are those of another {', '.join(changed)} ({changes}); name another "
                "cache.directory, or delete this one to write it anew"
            )

    def answers(self, batch: Batch, step: int) -> dict[str, np.ndarray]:
        """The answers to a batch, zeros outside the distillation mask.

        Raises:
          ValueError: for a row that the cache has not seen.
        """
        mask = answered(batch)
        record = self.layout.record
        dtypes = {"ids": np.dtype(np.int32), "logits": np.dtype(self.layout.dtype), "logsumexp": np.dtype(np.float32)}
        columns = {part: np.zeros((*mask.shape, *record[part].shape), dtype) for part, dtype in dtypes.items()}
        rows = np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1))
        digests = row_digests(batch) if step >= 0 and len(rows) else []
        for row in rows if digests else ():
            number = self._numbers.get(digests[row])
            if number is None:
                made = ", ".join(f"{name} {value}" for name, value in self.made_for.items())
                raise ValueError(
                    f"step {step}, row {row}: the answers in {self.directory} do not cover this row; they were written "
                    f"for {made}. Train with these, or write another cache"
                )
            values = np.frombuffer(self._reader.read([number])[0], record)
            for part, column in columns.items():
                column[row][mask[row]] = values[part]
        return columns

    def check(self, batches: Batches, steps: int) -> None:
        """Raises ValueError when the first or the last of so many batches has a row that the cache has not seen."""
        for step in (0, steps - 1):
            self.answers(batches(step), step)

    def attach(self, batches: Batches, name: str) -> Batches:
        """Batches with the columns `{name}_ids`, `{name}_logits` and `{name}_logsumexp`."""

        def add(batch: Batch, step: int) -> Batch:
            return batch | {f"{name}_{part}": value for part, value in self.answers(batch, step).items()}

        return batches.map(add)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


# -- writing ----------------------------------------------------------------------------------------------------------


def write_cache(
    directory: Path,
    fingerprint: Mapping[str, Any],
    layout: Layout,
    batches: Batches,
    made_for: Mapping[str, int],
    answer: Callable[[Batch], Answers],
    writes: bool = True,
) -> None:
    """Asks the teacher about every row of the first `made_for["steps"]` batches, each once, and keeps its answers.

    The directory appears when it is complete: what was cut off is written anew.

    Args:
      fingerprint: what the answers depend on, by name.
      made_for: the run's `steps`, `seed` and `batch_size`, which say what rows there are.
      answer: the teacher.
      writes: whether this process writes, of several that ask together.
    """
    unfinished = directory.with_name(f"{directory.name}.part")
    record = layout.record
    writer = None
    if writes:
        require("array_record", "teacher-cache")
        from array_record.python.array_record_module import ArrayRecordWriter

        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        writer = ArrayRecordWriter(str(unfinished / "rows.array_record"), "group_size:1,uncompressed")

    # One record for every row that has positions to answer and was not met before.
    written: dict[bytes, None] = {}
    positions = 0
    for step in range(made_for["steps"]):
        batch = batches(step)
        mask = answered(batch)
        digests = row_digests(batch)
        unseen = [r for r in range(len(digests)) if mask[r].any() and digests[r] not in written]
        if not unseen:
            continue
        answers = answer(batch)
        for row in unseen:
            if digests[row] in written:  # twice in one batch
                continue
            written[digests[row]] = None
            values = np.zeros(int(mask[row].sum()), record)
            for name in record.names or ():
                values[name] = answers[name][row][mask[row]]
            positions += len(values)
            if writer is not None:
                writer.write(values.tobytes())
    if writer is None:
        return
    writer.close()

    # The index, and what the cache is; then it gets its name.
    np.save(unfinished / "index.npy", np.frombuffer(b"".join(written), np.uint8).reshape(-1, 16))
    size = sum(file.stat().st_size for file in unfinished.iterdir())
    facts = {
        "rows": len(written),
        "tokens": positions,
        "bytes": size,
        "bytes_per_token": round(size / max(positions, 1), 2),
    }
    about = {"fingerprint": dict(fingerprint), "layout": asdict(layout), "made_for": dict(made_for), "facts": facts}
    (unfinished / "cache.json").write_text(json.dumps(about, indent=2) + "\n")
    unfinished.rename(directory)
