"""safetensors, one tensor at a time: memory never holds more of a file than the tensor in hand.

A file is eight bytes (the length of the header, little endian), a JSON header `{name: {dtype, shape, data_offsets}}`
and the data. Files are read with plain reads and not mapped: mapped pages would count as this program's memory.

safetensors has no integers of four bits. They are stored as U8, two to a byte along the last dimension, the first in
the lower half, and the header's `__metadata__` says what they are: `{name: "int4[192,768]"}`.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.core import nearest

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INT4 = np.dtype(ml_dtypes.int4)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
MAX_HEADER = 100 << 20
MAX_JSON = 64 << 20
MAX_DEPTH = 100
"""Bytes of a JSON file, and how deep its tables and lists may nest, which all that walk through them rely on."""
MAX_DIMS, MAX_DIM = 32, 1 << 48
"""Dimensions of a tensor, and the largest of them."""
BLOCK = 1 << 22
"""Elements that are converted to another dtype at a time."""
MAX_SHARD_BYTES = 5 << 30


class Tensor(NamedTuple):
    """A tensor that is read when it is asked for.

    Attributes:
      shape, dtype: what `read()` gives; nbytes: what it takes in a file.
      read: gives the numpy array, by `read(dtype)` converted to another float dtype on the way; nothing is kept.
      location: where it comes from, for messages.
      array: what `read` copies, where that is in memory already.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]
    location: str = "memory"
    array: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(stored_shape(self.shape, self.dtype)) * self.dtype.itemsize

    @classmethod
    def of(cls, array: Any, name: str) -> "Tensor":
        """An array that is there already (numpy's or jax's)."""

        def read(dtype: Any = None) -> np.ndarray:
            values = np.asarray(array)
            if dtype is None or values.dtype == dtype:
                return values
            out = np.empty(values.shape, dtype)
            source, target = values.reshape(-1), out.reshape(-1)
            for start in range(0, source.size, BLOCK):
                _convert(source[start : start + BLOCK], target[start : start + BLOCK], name)
            return out

        return cls(tuple(array.shape), np.dtype(array.dtype), read, array=array)

    def cast(self, dtype: Any) -> "Tensor":
        """The same in another float dtype; integers and booleans stay.

        Raises:
          ValueError: (on reading) when a finite value does not fit into the narrower dtype.
        """
        dtype = np.dtype(dtype)
        if dtype == self.dtype or not is_float(self.dtype):
            return self
        read = lambda wanted=None: self.read(dtype if wanted is None else wanted)  # noqa: E731
        return self._replace(dtype=dtype, read=read, array=None)


def _convert(values: np.ndarray, out: np.ndarray, name: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values
    if ml_dtypes.finfo(out.dtype).max < ml_dtypes.finfo(values.dtype).max:
        lost = int(np.count_nonzero(np.isfinite(values)) - np.count_nonzero(np.isfinite(out)))
        if lost:
            raise ValueError(f"values of {name} overflow {out.dtype}; use bfloat16 or float32")


def is_float(dtype: Any) -> bool:
    """Whether a dtype holds floating-point numbers, those of ml_dtypes included."""
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype in (DTYPES["BF16"], DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])


def stored_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape in a file: two entries of the last dimension to a byte, where the dtype has four bits.

    >>> stored_shape((3, 5), INT4), stored_shape((3, 5), np.dtype(np.int8))
    ((3, 3), (3, 5))
    """
    return (*shape[:-1], (shape[-1] + 1) // 2) if dtype == INT4 else shape


def pack(array: np.ndarray) -> np.ndarray:
    """Four-bit integers `[…, n]` as bytes `[…, ceil(n/2)]`, the first of two in the lower half.

    >>> pack(np.array([1, -1, 2], INT4)).tolist()
    [241, 2]
    """
    halves = array.astype(np.int8).view(np.uint8) & 15
    if halves.shape[-1] % 2:
        halves = np.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, 1)])
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack(packed: np.ndarray, length: int) -> np.ndarray:
    """The inverse of `pack`, for a last dimension of `length`.

    >>> unpack(np.array([241, 2], np.uint8), 3).astype(int).tolist()
    [1, -1, 2]
    """
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :length]
    return ((halves.view(np.int8) ^ 8) - 8).astype(INT4)


def packed_shape(metadata: Mapping[str, str], name: str) -> tuple[int, ...] | None:
    """Shape that a header's metadata give a tensor of four-bit integers; `None` for any other tensor.

    >>> packed_shape({"w": "int4[3,5]"}, "w")
    (3, 5)
    """
    text = metadata.get(name, "")
    if not text.startswith("int4["):
        return None
    match = re.fullmatch(r"int4\[([0-9]{1,15}(?:,[0-9]{1,15}){0,31})\]", text)
    if match is None:
        raise ValueError(f"tensor {name!r} is described as {reprlib.repr(text)}, expected int4[inputs,outputs]")
    return tuple(map(int, match[1].split(",")))


# Reading ------------------------------------------------------------------------------------------------------------


def find_file(directory: Path, name: str) -> Path | None:
    """A file of a model directory; `None` where there is none.

    Links are followed within the directory, and in the cache of the Hugging Face hub from a snapshot to its blobs,
    which is how that library keeps files. Anywhere else a link could name any file of this machine, and its content
    would end up in what is saved.

    Raises:
      ValueError: a link that leads elsewhere, or something that is no plain file.
      FileNotFoundError: a link to a file that is missing.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    caches = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if root not in target.parents and target.parent not in caches:
        raise ValueError(
            f"{path} is a link to {target}, outside of its directory, and is not followed; put a copy of the file in "
            "its place"
        )
    if not os.path.lexists(target):
        raise FileNotFoundError(f"{path} is a link to {target}, which is missing")
    if not target.is_file():
        raise ValueError(f"{path} is no plain file; put the file itself in its place")
    return path


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory, from `model.safetensors`, or else from the shards that its index names.

    Where both are there the index is a remnant: transformers, too, takes the single file.

    Raises:
      FileNotFoundError: no tensors, or a shard is missing.
      ValueError: pickles instead of safetensors, or a damaged file; the message names it.
    """
    if single := find_file(directory, SINGLE):
        return open_file(single)
    if index := find_file(directory, INDEX):
        return _open_shards(index)
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{directory} holds {pickles[0]}, a pickle, which can run any code when it is opened; jaxlm reads only "
            f"{SINGLE}. Save the model again with transformers' save_pretrained, on a machine that trusts the file"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; there is {', '.join(others[:3])}, but no {INDEX}" if others else ""
    raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}{hint}")


def _open_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names")
    members: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        members.setdefault(file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, names in sorted(members.items()):
        if not re.fullmatch(r"[^/\\]{1,200}\.safetensors", file) or not file.isprintable():
            raise ValueError(f"{index} names {reprlib.repr(file)}, expected the name of a .safetensors file beside it")
        path = find_file(index.parent, file)
        if path is None:
            raise FileNotFoundError(f"{index.parent / file} is missing: {index.name} expects {names[0]!r} in it")
        shard = open_file(path)
        for name in names:
            if name not in shard:
                raise ValueError(f"{path} has no tensor {name!r}, which {index.name} expects in it")
        if twice := tensors.keys() & shard.keys():
            raise ValueError(f"{path} holds {min(twice)!r}, which another shard holds too")
        tensors |= shard
    return tensors


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; its header is checked against its size before anything is read.

    Raises:
      ValueError: the header is no safetensors header, or does not agree with the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path} is no safetensors file{_guess(start)}: its header of {length} bytes cannot be")
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file{_guess(start)}: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is no table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is {reprlib.repr(metadata)}, expected a table of texts")
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        dtype, shape, (first, last) = _entry(path, name, entry)
        expected = math.prod(shape) * dtype.itemsize
        if last - first != expected or first != end:
            raise ValueError(
                f"{path}: tensor {name!r} lies at bytes {first} to {last}, expected {end} to {end + expected} "
                f"({dtype} {list(shape)})"
            )
        end = last
        if 8 + length + end > size:
            raise ValueError(
                f"{path} is truncated in tensor {name!r}: {size} bytes, its header needs {8 + length + end} or more"
            )
        tensors[name] = Tensor(shape, dtype, _reader(path, name, 8 + length + first, shape, dtype), str(path))
        try:
            whole = packed_shape(metadata, name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if whole is not None:
            tensors[name] = _unpacked(path, name, tensors[name], whole)
    if 8 + length + end != size:
        raise ValueError(f"{path} has {size} bytes, its header describes {8 + length + end}")
    return tensors


def _unpacked(path: Path, name: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    if stored.dtype != DTYPES["U8"] or stored.shape != stored_shape(shape, INT4):
        raise ValueError(
            f"{path}: tensor {name!r} should hold int4 {list(shape)} packed, but is {stored.dtype} {list(stored.shape)}"
        )
    return Tensor(shape, INT4, lambda wanted=None: unpack(stored.read(), shape[-1]), str(path))


def _guess(start: bytes) -> str:
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return " but a pickle, which jaxlm does not open"
    return " but a pointer of Git LFS, whose file was not fetched" if start == b"version " else ""


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    first, last = _entry(path, name, entry)[2]
    return first, last


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and offsets of a header entry, checked for their kind."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(
            f"{path}: tensor {name!r} needs dtype, shape and data_offsets, the header has {reprlib.repr(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not counts(shape) or not counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{path}: tensor {name!r} has the shape {reprlib.repr(shape)} and the offsets {reprlib.repr(offsets)}"
        )
    if len(shape) > MAX_DIMS or max(shape, default=0) > MAX_DIM:
        raise ValueError(
            f"{path}: tensor {name!r} has the shape {reprlib.repr(shape)}, which no array has: at most {MAX_DIMS} "
            f"dimensions of {MAX_DIM}"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has the dtype {reprlib.repr(dtype)}; {nearest(str(dtype), DTYPES)}")
    return DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


def _reader(path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[..., np.ndarray]:
    def read(wanted: Any = None) -> np.ndarray:
        converts = wanted is not None and np.dtype(wanted) != dtype
        out = np.empty(math.prod(shape), wanted if converts else dtype)
        block = np.empty(min(BLOCK, out.size), dtype) if converts else out
        with open(path, "rb") as file:
            file.seek(offset)
            for start in range(0, out.size, max(block.size, 1)):
                piece = block[: out.size - start]
                if file.readinto(piece.view(np.uint8).data) != piece.nbytes:
                    raise ValueError(f"{path} ended in tensor {name!r}: it changed while it was read")
                if dtype == np.bool_ and piece.view(np.uint8).max(initial=0) > 1:
                    raise ValueError(f"{path}: tensor {name!r} holds bytes that are neither false (0) nor true (1)")
                if converts:
                    _convert(piece, out[start : start + piece.size], f"tensor {name!r} of {path}")
        return out.reshape(shape)

    return read


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file holds something else, by name; see `parse_json`.
    """
    with open(path, "rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise ValueError(f"{path} has more than {MAX_JSON >> 20} MiB, too many for what it should hold")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: bytes) -> Any:
    """JSON in UTF-8, with or without a byte order mark; Infinity and NaN are taken, transformers writes them.

    Raises:
      ValueError: for anything else, for a key that a table has twice (readers differ in which they take), and for
        tables and lists nested deeper than MAX_DEPTH.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_table)
    except RecursionError:
        raise ValueError(f"tables and lists are nested deeper than {MAX_DEPTH}") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(f"tables and lists are nested deeper than {MAX_DEPTH}")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key in table if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} is given twice")
    return table


# Writing ------------------------------------------------------------------------------------------------------------


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (a larger tensor alone) with their index.

    Args:
      progress: told the bytes of each tensor once it is written.
    """
    # Wide dtypes first keeps every tensor aligned to its element.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    shards: list[list[str]] = [[]]
    filled = 0
    for name in order:
        nbytes = tensors[name].nbytes
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    if len(shards) == 1:
        write_file(directory / SINGLE, {name: tensors[name] for name in order}, progress)
        return
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, {name: tensors[name] for name in members}, progress)
        weight_map |= dict.fromkeys(members, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / INDEX, [json.dumps(index, indent=2) + "\n"])


def write_file(
    path: Path, tensors: Mapping[str, Tensor], progress: Callable[[int], None] = lambda nbytes: None
) -> None:
    """One safetensors file, written under another name and renamed when it is complete and on disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES and tensor.dtype != INT4:
            raise ValueError(f"{name!r} has the dtype {tensor.dtype}, which safetensors does not have")
        if tensor.dtype == INT4:
            header["__metadata__"][name] = f"int4[{','.join(map(str, tensor.shape))}]"
        header[name] = {
            "dtype": NAMES.get(tensor.dtype, "U8"),
            "shape": list(stored_shape(tensor.shape, tensor.dtype)),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterable[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name, tensor in tensors.items():
            array = tensor.read()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{name!r} was announced as {tensor.dtype} {tensor.shape}, is {array.dtype} {array.shape}"
                )
            array = pack(array) if tensor.dtype == INT4 else array
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            del array
            progress(tensor.nbytes)

    _write(path, chunks())


def write_text(path: Path, lines: Iterable[str]) -> None:
    """A text file, complete or not there."""
    _write(path, (line.encode() for line in lines))


def _write(path: Path, chunks: Iterable[Any]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                del chunk
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
