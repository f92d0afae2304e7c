"""Ragged: sequences of different lengths in two flat arrays. Examples: a table of such columns."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

_PART = 1 << 20  # values that are hashed at a time, as all may not fit in memory


@dataclass(frozen=True)
class Ragged:
    """``n`` sequences in one array: sequence ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    Attributes:
      values: integers, ``[total]``; in memory, or mapped from a file and of the narrowest type that holds them.
      offsets: int64 ``[n + 1]``, from 0 to ``total``, non-decreasing.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        offsets = self.offsets
        if offsets.dtype != np.int64 or offsets.ndim != 1 or self.values.ndim != 1:
            raise ValueError(
                f"Ragged needs values [total] and int64 offsets [n + 1], not {offsets.dtype} {offsets.shape}"
            )
        if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != len(self.values) or np.any(np.diff(offsets) < 0):
            raise ValueError(f"offsets must rise from 0 to the number of values, {len(self.values)}")

    @classmethod
    def of(cls, sequences: Iterable[np.ndarray | list], dtype: type | np.dtype = np.int32) -> "Ragged":
        """From a list of sequences.

        >>> Ragged.of([[1, 2], [], [3]]).offsets
        array([0, 2, 2, 3])
        """
        arrays = [np.asarray(sequence, dtype) for sequence in sequences]
        return cls(np.concatenate([np.empty(0, dtype), *arrays]), offsets_of([len(array) for array in arrays]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of the sequences, int64 [n]."""
        return np.diff(self.offsets)

    def spans_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start in ``values`` and length of these rows; the cost does not depend on the number of all rows."""
        starts = self.offsets[:-1][rows]
        return starts, self.offsets[1:][rows] - starts

    def then(self, other: "Ragged") -> "Ragged":
        """These sequences followed by those of another."""
        values = np.concatenate([self.values, other.values])
        return Ragged(values, np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]]))

    def padded(self, rows: np.ndarray, length: int, fill: int) -> np.ndarray:
        """int32 ``[len(rows), length]``: these rows, right-padded with ``fill``; row -1 is all ``fill``.

        Raises ValueError if a row is longer than ``length``.
        """
        starts, lengths = self.spans_of(rows) if len(self) else (np.zeros_like(rows),) * 2
        lengths = np.where(rows >= 0, lengths, 0)
        if lengths.max(initial=0) > length:
            raise ValueError(f"row {rows[lengths.argmax()]} has {lengths.max()} values, more than {length}")
        result = np.full((len(rows), length), fill, np.int32)
        result[np.arange(length) < lengths[:, None]] = self.values[spans(starts, lengths)]
        return result


def offsets_of(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Offsets int64 [n + 1] of sequences of these lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices ``starts[i], .., starts[i] + lengths[i] - 1`` of all spans, concatenated: int64 [sum of lengths].

    >>> spans(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


@dataclass(frozen=True)
class Examples:
    """Encoded examples: columns of equally many rows, a Ragged for sequences, an array for one value per row.

    ``input_ids`` is required. Ragged columns have its lengths, row by row; with a column ``decoder_input_ids``, the
    columns ``labels`` and ``decoder_*`` have the lengths of that one instead.

    Attributes:
      group: texts of an example, which stay together: sequences ``i * group`` to ``(i + 1) * group - 1`` of a Ragged
        are those of example ``i``. Arrays have one entry an example.
    """

    columns: Mapping[str, Ragged | np.ndarray]
    group: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.columns.get("input_ids"), Ragged):
            raise ValueError(f"Examples need a ragged column 'input_ids', not only {sorted(self.columns)}")
        texts = {name: len(column) for name, column in self.columns.items() if isinstance(column, Ragged)}
        sizes = {name: len(column) // (self.group if name in texts else 1) for name, column in self.columns.items()}
        if broken := [name for name, count in texts.items() if count % self.group]:
            raise ValueError(f"{texts[broken[0]]} texts in column {broken[0]!r} are no groups of {self.group}")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"columns differ in their number of rows: {sizes}")
        for name, column in self.columns.items():
            side = self._ragged("decoder_input_ids" if self.on_decoder(name) else "input_ids")
            if isinstance(column, Ragged) and not np.array_equal(column.offsets, side.offsets):
                row = int((column.lengths != side.lengths).argmax())
                raise ValueError(
                    f"row {row}: column {name!r} has {column.lengths[row]} values, not {side.lengths[row]}"
                )

    def _ragged(self, name: str) -> Ragged:
        column = self.columns[name]
        assert isinstance(column, Ragged)
        return column

    def on_decoder(self, name: str) -> bool:
        """Whether a column belongs to the decoder."""
        return "decoder_input_ids" in self.columns and (name.startswith("decoder_") or name == "labels")

    def __len__(self) -> int:
        return len(self.columns["input_ids"]) // self.group

    @property
    def lengths(self) -> np.ndarray:
        """Number of input tokens of every example, of the longest text of its group: int64 [n]."""
        return self._longest("input_ids")

    @property
    def decoder_lengths(self) -> np.ndarray | None:
        """Number of decoder tokens of every example, or None without decoder columns."""
        return self._longest("decoder_input_ids") if "decoder_input_ids" in self.columns else None

    def _longest(self, name: str) -> np.ndarray:
        lengths = self._ragged(name).lengths
        return lengths if self.group == 1 else lengths.reshape(-1, self.group).max(axis=1)

    def then(self, other: "Examples") -> "Examples":
        """These examples followed by those of another; raises ValueError if their columns differ."""
        if self.columns.keys() != other.columns.keys():
            raise ValueError(f"one has the columns {sorted(self.columns)}, the other {sorted(other.columns)}")
        if self.group != other.group:
            raise ValueError(f"one has groups of {self.group} texts, the other of {other.group}")
        columns: dict[str, Ragged | np.ndarray] = {}
        for name, column in self.columns.items():
            following = other.columns[name]
            if isinstance(column, Ragged) and isinstance(following, Ragged):
                columns[name] = column.then(following)
            elif isinstance(column, np.ndarray) and isinstance(following, np.ndarray):
                columns[name] = np.concatenate([column, following])
            else:
                raise ValueError(f"the column {name!r} has one value per row in one, one per token in the other")
        return Examples(columns, self.group)

    def fingerprint(self) -> str:
        """sha256 of names, dtypes and contents: equal for equal data, in memory or mapped from a file."""
        digest = hashlib.sha256(b"" if self.group == 1 else f"groups of {self.group};".encode())
        for name in sorted(self.columns):
            column = self.columns[name]
            for array in (column.offsets, column.values) if isinstance(column, Ragged) else (column,):
                dtype = np.promote_types(array.dtype, np.int32) if isinstance(column, Ragged) else array.dtype
                digest.update(f"{name} {dtype.str} {array.shape};".encode())
                for start in range(0, len(array), _PART):
                    digest.update(np.ascontiguousarray(array[start : start + _PART], dtype).data)
        return digest.hexdigest()
