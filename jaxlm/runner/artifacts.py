"""What a run leaves beside its model: the config and versions it was made with, hashes, sizes."""

import contextlib
import errno
import json
import platform
import resource
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxlm.core.strict_json import strict
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.data.sources.contents import changes, contents

PLACEMENT = ("mesh_axes", "mesh", "sharding")
"""Fields that say where a run takes place and not what it is: it may go on on another mesh."""


def check_same_config(config: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError when `workdir` holds a run of another config, naming the fields that differ."""
    path = workdir / "config.json"
    if not path.exists():
        return
    before, now = ({k: v for k, v in values.items() if k not in PLACEMENT} for values in (read_json(path), config))
    now = json.loads(json.dumps(now))
    changes = [f"{name}: {old!r} there, {new!r} now" for name, old, new in differences(before, now, "config")]
    if changes:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  " + "\n  ".join(changes) + "\n"
            "choose another --workdir, or delete this one"
        )


def data_contents(config: Mapping[str, Any], earlier: Mapping[str, Any] = {}) -> dict[str, Any]:
    """What lies at every place of a config that data are read from, by field, see `contents`.

    Args:
      config: plain values or a ConfigDict; earlier: an answer from before.
    """
    data, calibration = DataSettings(**config["data"]), CalibrationSettings(**config["calibration"])
    places = {f"config.data.{split}": (data.format, getattr(data, split)) for split in ("train", "eval", "test")}
    places["config.data.unlabelled"] = data.unlabelled_format, data.unlabelled
    if config["surgery"] and calibration.source != "train":
        places["config.calibration.source"] = data.format, calibration.source
    return {field: contents(*place, earlier.get(field, {})) for field, place in places.items() if place[1]}


def check_same_data(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What the data of a run hold now.

    Raises:
      ValueError: where they are no longer those that the run in `workdir` began with, naming the files.
    """
    path = workdir / "data.json"
    before = read_json(path) if path.exists() else {}
    now = data_contents(config, before)
    changed = [f"{field}: {file}" for field in before for file in changes(before[field], now.get(field, {}))]
    if changed:
        raise ValueError(
            f"{workdir} holds a run over data that have changed since:\n  " + "\n  ".join(changed[:8]) + "\n"
            "choose another --workdir, or delete this one"
        )
    return now


def differences(before: Any, now: Any, field: str) -> Iterator[tuple[str, Any, Any]]:
    """`(field, before, now)` of every field that differs.

    >>> list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, "config"))
    [('config.a.c', 2, 3)]
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{field}.{key}")
    elif before != now:
        yield field, before, now


def write_provenance(config: dict[str, Any], workdir: Path, data: Mapping[str, Any]) -> None:
    """Saves the resolved config, and the data (see `data_contents`), versions, commit and devices of the beginning."""
    if (workdir / "config.json").exists() or jax.process_index():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    write_json(
        workdir / "versions.json",
        {
            "python": platform.python_version(),
            "commit": commit(),
            "devices": [str(d) for d in jax.devices()],
            "packages": {name: version(name) for name in packages},
        },
    )
    write_json(workdir / "data.json", data)
    write_json(workdir / "config.json", config)


def commit() -> str | None:
    """The commit of the code that runs, `None` outside a git checkout or without git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


@contextlib.contextmanager
def room_on_disk(workdir: Path) -> Iterator[None]:
    """Says of a full disk what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk of {workdir} is full ({error}); free some space and give the same command again: "
            "the run goes on from its last checkpoint",
        ) from error


def read_json(path: Path) -> Any:
    """The values in a file."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all; what is not a finite number is null."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(strict(value), indent=2, allow_nan=False) + "\n")
    part.replace(path)


def peak_memory() -> dict[str, int]:
    """Peak memory in bytes: of this process, and of its first device where that counts its own."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    host = {"peak_memory_bytes": peak if platform.system() == "Darwin" else peak * 1024}
    return host if device is None else host | {"device_peak_memory_bytes": device}
