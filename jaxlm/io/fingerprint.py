"""The fingerprint of a model's parameters: what results, caches and adapters recognise a model by."""

from hashlib import sha256
from typing import Any

import jax
import numpy as np

from jaxlm.core import Tree, arrays
from jaxlm.io.safetensors import Tensor


def params_sha256(params: Tree) -> str:
    """sha256 over names, dtypes and bytes of every array (or Tensor, read one at a time), in order of name."""
    total = sha256()
    for name, array in sorted(arrays(params).items()):
        host = np.ascontiguousarray(_on_host(array))
        total.update(f"{name} {host.dtype} {host.shape}".encode())
        total.update(host.tobytes())
    return total.hexdigest()


def _on_host(array: Any) -> np.ndarray:
    return array.read() if isinstance(array, Tensor) else jax.device_get(array)
