"""What a run leaves beside its model: the config and versions it was made with, hashes, sizes."""

import json
import platform
import resource
import subprocess
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core import Tree, arrays


def remember(config: dict[str, Any], workdir: Path) -> None:
    """Saves the resolved config with versions and commit; refuses a directory that holds another config."""
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(k for k in before.keys() | config.keys() if before.get(k) != config.get(k))
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config (config.{', config.'.join(changed)} differ); "
                f"choose another --workdir, or delete this one"
            )
        return
    write_json(path, config)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    write_json(
        workdir / "versions.json",
        {
            "python": platform.python_version(),
            "commit": commit.stdout.strip() or None,
            "devices": [str(d) for d in jax.devices()],
            "packages": {name: version(name) for name in packages},
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def params_sha256(params: Tree) -> str:
    """sha256 over names, dtypes and bytes of every array, in order of name."""
    total = sha256()
    for name, array in sorted(arrays(params).items()):
        host = np.ascontiguousarray(jax.device_get(array))
        total.update(f"{name} {host.dtype} {host.shape}".encode())
        total.update(host.tobytes())
    return total.hexdigest()


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
