"""Values as JSON can hold them (Python's own writer would put down a bare NaN, which no other reader takes), and
their hash."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """Plain values; what is not a finite number is `None`, NamedTuples are tables.

    >>> strict({"loss": float("nan"), "rows": (1, 2)})
    {'loss': None, 'rows': [1, 2]}
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return strict(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy or jax
        return strict(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def digest(value: Any) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
