"""Sparse storage: of a tensor with many zeros, where it is not zero and what it is there. It loads back exact.

The *support* of a tensor, true where an entry is stored, takes one of these forms; the *values* go with it, in order.

- `bits`: one bit an entry.
- `N:M`: of every M entries along the inputs (the last axis but one), N are stored; each one's place in its group takes
  `log2 M` bits, rounded up. Where a group has fewer than N that are not zero, zeros fill it up.
- `like <name>`: as another tensor says, a mask that is stored anyway.

Masks need no values, and integers from 0 on may be `packed`, in as many bits as the largest takes. Whatever takes the
fewest bytes is taken, tensor by tensor; one that would gain less than a description costs stays as it is. For n entries
of b bytes of which m are stored, the sizes are `n/8 + m b`, `m ceil(log2 M)/8 + m b` and `m b`.
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core import checked, lookup
from jaxlm.io.safetensors import DTYPES, INT4, MAX_DIM, MAX_DIMS, NAMES, Tensor, is_float

GROUPS = (4, 8, 16)
"""Group sizes M that are tried."""

OVERHEAD = 256
"""Bytes that a tensor has to gain: about what its parts cost in the header and in jaxlm.json."""

BLOCK = 1 << 20
"""Entries that are packed at a time."""

Described = dict[str, dict[str, Any]]


def compress(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Described]:
    """The tensors to store, and what those that are not stored as they are were: `{name: description}`.

    Reads one tensor at a time, here and again when it is written.
    """
    stored: dict[str, Tensor] = {}
    described: Described = {}
    for name, tensor in tensors.items():
        smallest = _smallest(name, tensor, tensors)
        if smallest is None:
            stored[name] = tensor
        else:
            description, parts = smallest
            described[name] = {"shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype), **description}
            stored |= parts
    return stored, described


def expand(tensors: Mapping[str, Tensor], described: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The inverse of `compress`; nothing is read yet.

    Raises:
      ValueError: for a description or a stored part that cannot be, naming the tensor.
    """
    if not isinstance(described, Mapping):
        raise ValueError(f"{file}: 'sparse' should be a table of tensors, not {reprlib.repr(described)}")
    left, whole = dict(tensors), dict[str, Tensor]()
    last = lambda item: str(item[1]).find("'like ") >= 0  # noqa: E731
    for name, description in sorted(described.items(), key=last):  # what is like a mask comes after the mask
        try:
            if name in left:
                raise ValueError("it is stored as it is, too")
            form = dict(checked(description, dict, "its description"))
            shape, dtype = _shape_of(form.pop("shape", None)), _dtype_of(form.pop("dtype", None))
            whole[name] = _whole(name, shape, dtype, form, left, whole)
        except ValueError as error:
            shown = reprlib.repr(description)
            raise ValueError(f"{file}: {name!r} cannot be unpacked as {shown}: {error}") from None
    return {**left, **whole}


# Choosing -----------------------------------------------------------------------------------------------------------


def _smallest(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]] | None:
    """The form that takes the fewest bytes, with its parts; `None` for the tensor as it is."""
    if tensor.nbytes <= OVERHEAD or len(tensor.shape) < 2:
        return None
    options: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    array = tensor.read()
    support = _nonzero(array)
    if tensor.dtype == np.bool_:
        options += [({"support": form}, {f"{name}#support": t}) for form, t in _supports(tensor, support, exact=True)]
    else:
        options += [
            ({"support": form}, {f"{name}#support": places, f"{name}#values": _values(tensor, form, support)})
            for form, places in _supports(tensor, support, exact=False)
        ]
        mask = _mask_over(name, tensor, tensors)
        if mask is not None and not (support & ~tensors[mask].read()).any():
            options.append(({"support": f"like {mask}"}, {f"{name}#values": _values_like(tensor, tensors[mask])}))
        if tensor.dtype == np.uint8:
            bits = int(array.max(initial=0)).bit_length() or 1
            if bits < 8:
                options.append(({"packed": bits}, {f"{name}#packed": _packed(tensor, bits)}))
    best = min(options, key=_size, default=None)
    return best if best is not None and _size(best) + OVERHEAD < tensor.nbytes else None


def _size(option: tuple[dict, dict[str, Tensor]]) -> int:
    return sum(part.nbytes for part in option[1].values())


def _nonzero(array: np.ndarray) -> np.ndarray:
    """Where an array is not zero; minus zero is something else than zero."""
    return array if array.dtype == np.bool_ else array.view(f"u{array.dtype.itemsize}") != 0


def _supports(tensor: Tensor, support: np.ndarray, exact: bool) -> Iterable[tuple[str, Tensor]]:
    """Every form of a support with the tensor that holds it, `N:M` first; `exact`: groups may not be filled up."""
    for form in _groups_of(support, exact):
        kept, group = map(int, form.split(":"))
        per = _place_bits(group)
        count = -(-support.size // group * kept * per // 8)
        yield form, _lazy(tensor, count, partial(_pack_places, form=form, bits=per))
    yield "bits", _lazy(tensor, -(-support.size // 8), lambda a: np.packbits(_nonzero(a).reshape(-1)))


def _pack_places(array: np.ndarray, form: str, bits: int) -> np.ndarray:
    return _pack(_places(_nonzero(array), form), bits)


def _groups_of(support: np.ndarray, exact: bool) -> list[str]:
    """`N:M` patterns that a support of at least two axes has, along its last axis but one."""
    patterns = []
    for group in GROUPS:
        if support.shape[-2] % group == 0:
            counts = _grouped(support, group).sum(axis=-2)
            kept = int(counts.max(initial=1)) or 1
            if kept < group and not (exact and counts.min(initial=kept) < kept):
                patterns.append(f"{kept}:{group}")
    return patterns


def _mask_over(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """The stored mask of the Masked that holds this tensor, if it has its shape."""
    parts = name.split(".base")
    for count in range(len(parts) - 1, 0, -1):
        mask = ".base".join(parts[:count]) + ".mask"
        if mask in tensors and tensors[mask].shape == tensor.shape and tensors[mask].dtype == np.bool_:
            return mask
    return None


def _values(tensor: Tensor, form: str, support: np.ndarray) -> Tensor:
    """The values at a support: in the order of the tensor, under `N:M` as `[…, groups, N, out]`."""
    if form == "bits":
        count = int(np.count_nonzero(support))
        return _lazy(tensor, count, lambda a: a[_nonzero(a)], tensor.dtype)
    kept, group = map(int, form.split(":"))

    def taken(array: np.ndarray) -> np.ndarray:
        places = _places(_nonzero(array), form)
        return np.take_along_axis(_grouped(array, group), places.astype(np.intp), axis=-2).reshape(-1)

    return _lazy(tensor, support.size // group * kept, taken, tensor.dtype)


def _values_like(tensor: Tensor, mask: Tensor) -> Tensor:
    return _lazy(tensor, int(np.count_nonzero(mask.read())), lambda array: array[mask.read()], tensor.dtype)


def _packed(tensor: Tensor, bits: int) -> Tensor:
    return _lazy(tensor, -(-math.prod(tensor.shape) * bits // 8), lambda array: _pack(array, bits))


def _lazy(tensor: Tensor, count: int, make: Callable[[np.ndarray], np.ndarray], dtype: Any = np.uint8) -> Tensor:
    """A part of a tensor, made when it is written."""
    return Tensor((count,), np.dtype(dtype), lambda wanted=None: make(tensor.read()), tensor.location)


# Reading back -------------------------------------------------------------------------------------------------------


def _whole(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    form: Mapping[str, Any],
    left: dict[str, Tensor],
    whole: Mapping[str, Tensor],
) -> Tensor:
    """A tensor out of its parts, which leave `left`; the mask that it is like is there, too, or was `found` before."""
    size = math.prod(shape)
    if set(form) == {"packed"}:
        bits = checked(form["packed"], int, "packed")
        if not 1 <= bits < 8 or dtype != np.uint8:
            raise ValueError(f"expected U8 packed in 1 to 7 bits, not {dtype} in {bits}")
        part = _part(left, f"{name}#packed", -(-size * bits // 8), np.dtype(np.uint8))
        return _made(name, shape, dtype, lambda: _unpack(part.read(), size, bits).reshape(shape), part)
    if set(form) != {"support"}:
        raise ValueError(f"expected either packed or support, not {reprlib.repr(sorted(form))}")
    kind = checked(form["support"], str, "support")
    if kind.startswith("like "):
        other = {**left, **whole}.get(kind[5:])
        if other is None or other.shape != shape or other.dtype != np.bool_:
            raise ValueError(f"there is no mask {kind[5:]!r} of its shape")
        source, support = other, other.read
    elif kind == "bits":
        source = _part(left, f"{name}#support", -(-size // 8), np.dtype(np.uint8))
        support = lambda: np.unpackbits(source.read(), count=size).view(np.bool_).reshape(shape)  # noqa: E731
    else:
        kept, group = _kept_of(kind)
        if len(shape) < 2 or shape[-2] % group:
            raise ValueError(f"{shape[-2] if shape[1:] else 'no'} inputs are not groups of {group}")
        grouped = (*shape[:-2], shape[-2] // group, kept, shape[-1])
        per = _place_bits(group)
        source = _part(left, f"{name}#support", -(-math.prod(grouped) * per // 8), np.dtype(np.uint8))

        def at_places(values: Any) -> np.ndarray:
            places = _unpack(source.read(), math.prod(grouped), per).reshape(grouped)
            out = np.zeros(shape, dtype)
            np.put_along_axis(_grouped(out, group), places.astype(np.intp), values, axis=-2)
            return out

        if dtype == np.bool_:
            return _made(name, shape, dtype, lambda: at_places(True), source)
        values = _part(left, f"{name}#values", math.prod(grouped), dtype)
        return _made(name, shape, dtype, lambda: at_places(values.read().reshape(grouped)), values)
    if dtype == np.bool_:
        return _made(name, shape, dtype, support, source)
    values = _part(left, f"{name}#values", None, dtype)

    def filled() -> np.ndarray:
        occupied, out = support(), np.zeros(shape, dtype)
        if np.count_nonzero(occupied) != values.shape[0]:
            raise ValueError(
                f"{values.location}: {name!r} has {values.shape[0]} values for {np.count_nonzero(occupied)} places: "
                "it is damaged"
            )
        out[occupied] = values.read()
        return out

    return _made(name, shape, dtype, filled, values)


def _part(left: dict[str, Tensor], name: str, count: int | None, dtype: np.dtype) -> Tensor:
    """Takes a stored part; its size and dtype must be what the description makes them."""
    if name not in left:
        raise ValueError(f"the tensor {name!r} is missing")
    part = left.pop(name)
    if part.dtype != dtype or len(part.shape) != 1 or count not in (None, part.shape[0]):
        raise ValueError(
            f"{name!r} is {part.dtype} {list(part.shape)}, expected {dtype} [{'n' if count is None else count}]"
        )
    return part


def _made(name: str, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray], part: Tensor) -> Tensor:
    def read(wanted: Any = None) -> np.ndarray:
        array = make()
        return array if wanted is None or not is_float(dtype) else Tensor.of(array, name).read(wanted)

    return Tensor(shape, dtype, read, part.location)


# Packing ------------------------------------------------------------------------------------------------------------


def _grouped(array: np.ndarray, group: int) -> np.ndarray:
    """`[…, in, out]` as `[…, groups, M, out]`, a view."""
    return array.reshape(*array.shape[:-2], array.shape[-2] // group, group, array.shape[-1])


def _places(support: np.ndarray, form: str) -> np.ndarray:
    """Places of N entries in every group, in order, those of the support first: uint8 `[…, groups, N, out]`."""
    kept, group = map(int, form.split(":"))
    order = np.argsort(~_grouped(support, group), axis=-2, kind="stable")[..., :kept, :]
    return np.sort(order, axis=-2).astype(np.uint8)


def _place_bits(group: int) -> int:
    """Bits of a place in a group."""
    return (group - 1).bit_length()


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """The lowest `bits` of every uint8, one after the other.

    >>> _pack(np.array([1, 2, 3, 0], np.uint8), 2).tolist()
    [108]
    """
    flat = values.reshape(-1)
    blocks = [flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK)]
    return np.concatenate([np.packbits(np.unpackbits(b[:, None], axis=1)[:, 8 - bits :]) for b in blocks])


def _unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The inverse of `_pack`, for `count` values."""
    out = np.zeros(count, np.uint8)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        bits_of_rows = packed[start * bits // 8 : -(-stop * bits // 8)]
        rows = np.unpackbits(bits_of_rows, count=(stop - start) * bits).reshape(-1, bits)
        out[start:stop] = np.packbits(np.pad(rows, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]
    return out


def _dtype_name(dtype: np.dtype) -> str:
    return NAMES.get(dtype, dtype.name)


def _dtype_of(name: Any) -> np.dtype:
    return lookup({**DTYPES, INT4.name: INT4}, checked(name, str, "dtype"), "dtype")


def _shape_of(value: Any) -> tuple[int, ...]:
    shape = checked(value, tuple[int, ...], "shape")
    if len(shape) > MAX_DIMS or not all(0 <= size <= MAX_DIM for size in shape):
        raise ValueError(f"no array has the shape {reprlib.repr(shape)}")
    return shape


def _kept_of(form: str) -> tuple[int, int]:
    """N and M of `N:M`."""
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", form)
    kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < group <= 256:
        raise ValueError(f"unknown support {reprlib.repr(form)}: expected bits, like <mask>, or N:M with N < M <= 256")
    return kept, group
