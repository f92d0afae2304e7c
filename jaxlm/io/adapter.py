"""Adapters: a model stored as what it has beyond its base.

The directory is one of the native layout without the arrays that are the base's, wherever in a Weight they lie now:
bit for bit, or once they are cast to another float dtype. jaxlm.json says which those are, and how the base is known:
by its place and by the sha256 of its parameters.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import arrays, checked, lookup
from jaxlm.io.fingerprint import params_sha256
from jaxlm.io.hub import find
from jaxlm.io.lm import LM
from jaxlm.io.safetensors import DTYPES, NAMES, Tensor, is_float


class Base(NamedTuple):
    """The model that an adapter belongs to, with Tensors for arrays; its directory or hub id (`None`: in memory)."""

    lm: LM
    path: str | Path | None = None


def beyond(lm: LM, base: Base, target: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of a model that are not its base's, and the entry `base` of jaxlm.json.

    Args:
      lm: with Tensors.
      target: directory of the adapter; a base that is a directory too is named relative to it.

    Raises:
      ValueError: where nothing is beyond the base.
    """
    ours, theirs = arrays(lm.params), arrays(base.lm.params)
    borrowed: dict[str, list[str]] = {}
    for name, tensor in ours.items():
        held = next((n for n in names_in_base(name) if n in theirs and holds(theirs[n], tensor)), None)
        if held is not None:
            cast = tensor.dtype != theirs[held].dtype
            borrowed[name] = [held, NAMES[tensor.dtype]] if cast else [held]
    beyond_base = {name: tensor for name, tensor in ours.items() if name not in borrowed}
    if not beyond_base and ours.keys() == theirs.keys():
        raise ValueError(f"{target}: every parameter is the base's; there is no adapter to write")
    path = base.path
    if path is not None and Path(path).expanduser().is_dir():
        path = os.path.relpath(Path(path).expanduser().resolve(), target)
    return beyond_base, {
        "path": "" if path is None else str(path),
        "sha256": params_sha256(base.lm.params),
        "arrays": borrowed,
    }


def names_in_base(name: str) -> Iterator[str]:
    """Names that an array may have in the base: those without the first 0, 1, 2 … Weights around it.

    >>> list(names_in_base("up/kernel.base.base.codes"))
    ['up/kernel.base.base.codes', 'up/kernel.base.codes', 'up/kernel.codes']
    """
    yield name
    path, _, field = name.partition(".")
    while field == "base" or field.startswith("base."):
        field = field.removeprefix("base").removeprefix(".")
        yield f"{path}.{field}" if field else path


def holds(base: Tensor, tensor: Tensor) -> bool:
    """Whether an array of the base, cast to the dtype of another, has its bits."""
    if base.shape != tensor.shape or (
        base.dtype != tensor.dtype and not (is_float(base.dtype) and is_float(tensor.dtype))
    ):
        return False
    try:
        return bits_of(base.cast(tensor.dtype)) == bits_of(tensor)
    except ValueError:  # a number that the narrower dtype does not have
        return False


def bits_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's entries, in which -0 is not 0, and one NaN is another."""
    return tensor.read().tobytes()


class Described(NamedTuple):
    """The entry `base` of a jaxlm.json.

    Attributes:
      path: directory relative to the adapter's, or a hub id; "" where the base was in memory.
      sha256: of its parameters.
      arrays: `{array of the adapted model: [array of the base]}`, with the dtype that it is cast to behind it.
    """

    path: str
    sha256: str
    arrays: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Any, file: Path) -> "Described":
        """From the JSON of `file`."""
        kinds = {"path": str, "sha256": str, "arrays": dict}
        entry = checked(entry, dict, f"{file}: base")
        return cls(**{key: checked(entry.get(key), kind, f"{file}: base: {key}") for key, kind in kinds.items()})

    def location(self, directory: Path, above: tuple[Path, ...]) -> Path:
        """The directory of the base of an adapter in `directory`; of a hub's only what was fetched before.

        Raises:
          FileNotFoundError: where it is not on this machine.
          ValueError: where none was written down, or one of the adapters `above` stands on itself.
        """
        if not self.path:
            raise ValueError(f"{directory} is an adapter, and does not say of which model; give it: load(…, base=…)")
        local = directory / self.path
        base = local.resolve() if local.is_dir() else find(self.path, fetch=False)
        if base in above:
            raise ValueError(f"{directory} is an adapter whose base is {base}, which stands on it")
        return base


def borrowed_tensors(described: Described, base: LM, file: Path) -> dict[str, Tensor]:
    """The arrays that an adapter takes of its base, by their names in the adapted model.

    Raises:
      ValueError: for another base, or an entry that cannot be.
    """
    actual = params_sha256(base.params)
    if actual != described.sha256:
        raise ValueError(
            f"{file}: the adapter belongs to a model whose parameters have the sha256 {described.sha256[:12]}…, its "
            f"base has {actual[:12]}…: it is another model, or the same in another dtype"
        )
    theirs, tensors = arrays(base.params), dict[str, Tensor]()
    for name, entry in described.arrays.items():
        held, *cast = checked(entry, tuple[str, ...], f"{file}: base: {name!r}") or ("",)
        tensor = lookup(theirs, held, f"array of the base in {file}:")
        tensors[name] = tensor.cast(lookup(DTYPES, cast[0], f"dtype in {file}:")) if cast else tensor
    return tensors
