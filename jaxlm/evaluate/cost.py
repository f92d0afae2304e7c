"""What a model costs, by counting: parameters, bytes on disk, floating-point operations per token."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import Tree, Weight, components, flatten, is_stacked
from jaxlm.core.paths import field_of
from jaxlm.io.safetensors import packed_shape

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of dtypes and ours; a name that is not listed is reported as it stands."""


class Parameters(NamedTuple):
    """Numbers of parameters; `non_embedding` leaves out every table that is only looked up or tied to the head."""

    total: int
    non_embedding: int


def parameters(params: Tree) -> Parameters:
    """Counts parameters of a tree in the canonical view: arrays or their shapes.

    A Weight counts as the matrix it stands for (`in · out`, however few bits or zeros it is stored with), plus what a
    low-rank update adds. Masks, scales and gates are bookkeeping and count nothing. A tied head has no leaf of its own
    and is counted once.
    """
    counts = {path: _matrix_size(leaf) for path, leaf in _leaves(params).items()}
    tables = sum(n for path, n in counts.items() if _is_embedding(path))
    return Parameters(sum(counts.values()), sum(counts.values()) - tables)


def flops_per_token(
    params: Tree,
    *,
    context: int,
    heads: Sequence[int],
    head_dim: int,
    causal: bool,
    tied_head: bool,
    once: str = "",
) -> int:
    """Floating-point operations of a forward pass, per token of a full context; training costs three times that.

    `2 N_mm + 4 Σ_l heads_l · head_dim · context`, the second term halved when causal (half the scores are masked).
    `N_mm` counts every kernel: look-ups cost nothing, the head is included, also where it is the token table. Products
    of any dtype count alike, and masked weights count in full: zeros are multiplied unless they are cut out.

    Args:
      params: arrays or shapes of an encoder-only or decoder-only model, in the canonical view.
      context: tokens in a row, `T`.
      heads: query heads of each layer.
      head_dim: width of a head.
      causal: whether a token sees only those before it.
      tied_head: whether the logits are a product with the token table (no kernel of its own).
      once: regex of kernels that are applied once a row, not once a token: a classifier of whole texts.
    """
    leaves = _leaves(params)
    if any(re.match(r"(encoder|decoder)/", path) for path in leaves):
        raise ValueError("FLOPs per token of an encoder-decoder depend on two lengths: flops_per_token_of_pairs")
    layers = {match[0] for path in leaves if (match := re.match(r"layers_\d+/", path))}
    if len(layers) != len(heads):
        raise ValueError(f"heads lists {len(heads)} layers, but the parameters have {len(layers)}")
    kernels = {path: _matrix_size(leaf) for path, leaf in leaves.items() if path.endswith("/kernel")}
    rare = sum(size for path, size in kernels.items() if re.fullmatch(once, path))
    products = sum(kernels.values()) - rare + (_token_table(leaves) if tied_head else 0)
    attention = 4 * sum(heads) * head_dim * context
    return 2 * products + 2 * rare // context + (attention // 2 if causal else attention)


def flops_per_token_of_pairs(
    params: Tree,
    *,
    lengths: tuple[int, int],
    heads: tuple[Sequence[int], Sequence[int], Sequence[int]],
    head_dim: int,
    tied_head: bool,
) -> int:
    """The same of an encoder-decoder, over the `s + t` tokens of a source and its target, `lengths = (s, t)`.

    Source tokens pass the encoder and the keys and values of cross-attention, target tokens all the rest; scores cost
    `4 heads · head_dim` for each of the `s²`, `t²/2` and `s·t` pairs of tokens.

    Args:
      params: arrays or shapes, canonical view.
      heads: query heads of each layer: in the encoder, in the decoder, across.
      head_dim: width of a head.
      tied_head: whether the logits are a product with the token table.
    """
    leaves, (source, target) = _leaves(params), lengths
    kernels = {path: _matrix_size(leaf) for path, leaf in leaves.items() if path.endswith("/kernel")}
    of_source = r"encoder/.*|decoder/layers_\d+/cross_attention/(key|value)/kernel"
    first = sum(size for path, size in kernels.items() if re.fullmatch(of_source, path))
    second = sum(kernels.values()) - first + (_token_table(leaves) if tied_head else 0)
    in_encoder, in_decoder, across = map(sum, heads)
    pairs = in_encoder * source**2 + in_decoder * target**2 // 2 + across * source * target
    return (2 * (first * source + second * target) + 4 * head_dim * pairs) // (source + target)


def _token_table(leaves: Mapping[str, Any]) -> int:
    if "embed/tokens/embedding" not in leaves:
        raise KeyError("tied_head: there is no token table at embed/tokens/embedding")
    return _matrix_size(leaves["embed/tokens/embedding"])


def bytes_by_dtype(directory: str | Path) -> dict[str, int]:
    """Bytes of the tensors in a model directory by dtype, largest first, from the headers of its safetensors files.

    Integers of four bits count under their own name, though the files hold them as bytes, two in each.
    """
    sizes: dict[str, int] = {}
    for file in _weight_files(directory):
        header = _header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                packed = packed_shape(header.get("__metadata__", {}), name) is not None
                dtype = "int4" if packed else DTYPES.get(entry["dtype"], entry["dtype"])
                sizes[dtype] = sizes.get(dtype, 0) + end - start
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def bytes_by_tensor(directory: str | Path) -> dict[str, int]:
    """Bytes of every tensor in a model directory by its name in the file."""
    entries = (item for file in _weight_files(directory) for item in _header(file).items())
    return {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries if n != "__metadata__"}


def bytes_on_disk(directory: str | Path) -> int:
    """Size of the safetensors files of a model directory, headers included; config and tokenizer are not counted."""
    return sum(file.stat().st_size for file in _weight_files(directory))


def _leaves(params: Tree) -> dict[str, Any]:
    leaves = flatten(params)
    stacked = next(filter(is_stacked, leaves), None)
    if stacked is not None:
        raise ValueError(
            f"costs are counted on the canonical view, but {stacked} is a stack of layers: unstack it first"
        )
    return leaves


def _is_embedding(path: str) -> bool:
    return path.endswith("/embedding")


def _matrix_size(leaf: Any) -> int:
    """Entries of the matrix behind a leaf; a weight that exists only as factors counts those."""
    parts = {field: part.role for field, part in components(leaf, (None, None)).items()}
    size = {field: math.prod(field_of(leaf, field).shape) for field in parts}
    factors = sum(size[field] for field, role in parts.items() if role == "factor")
    if isinstance(leaf, Weight):
        return factors + (math.prod(leaf.shape) if {"base", "codes"} & set(parts.values()) else 0)
    return factors + sum(size[field] for field, role in parts.items() if role == "base")


def _weight_files(directory: str | Path) -> list[Path]:
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no *.safetensors file: it is not a model directory")
    return files


def _header(file: Path) -> Mapping[str, Any]:
    """The JSON header: an unsigned little-endian length of 8 bytes, then that many bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        available = file.stat().st_size - 8
        if length > available:
            raise ValueError(
                f"{file} is truncated: its header should take {length} bytes, {max(available, 0)} are there"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file: its header is a JSON {type(header).__name__}")
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if end > available - length:
        raise ValueError(f"{file} is truncated: its tensors should take {end} bytes, {available - length} are there")
    return header
