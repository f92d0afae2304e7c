"""Values as strict JSON can hold them (Python's writer emits NaN, which others reject), and their hash."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """Plain values; numbers that are not finite become `None`, NamedTuples tables.

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
    """sha256, in hexadecimal, of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
