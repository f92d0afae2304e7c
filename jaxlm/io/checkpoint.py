"""Training checkpoints: written in the background, committed atomically, verified when they are read.

A checkpoint is one directory named after its step. orbax writes the arrays and renames the directory into place when
everything is on disk, so an interrupted save leaves only a temporary directory. Beside the arrays lies a manifest:
shape, dtype and checksum of every leaf, the caller's metadata, and a digest of the manifest itself. orbax alone would
restore flipped bits and cast dtypes without a word.

The checksum of a leaf is computed on the device, before the arrays are handed over, from its 32-bit words b_0 … b_{n-1}
(narrower elements are widened to one word, 64-bit elements are two words):

    m_i = h(K·i ⊕ b_i),   c_0 = Σ_i m_i,   c_1 = Σ_i (2i + 1)·m_i   (mod 2³²)

with h the finalizer of MurmurHash3, a bijection of 32-bit words, and K odd. Changing one word always changes both sums;
any other damage goes unseen with probability about 2⁻⁶³. A sum does not depend on the order of its terms, so the same
numbers come out of every sharding, every mesh and every number of hosts, at the price of one pass over memory.
"""

import difflib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as orbax

_TEMPORARY = ".orbax-checkpoint-tmp"  # what orbax appends to a directory until it is committed


class _Damaged(Exception):
    """A committed checkpoint that cannot be trusted; the message says why."""


class Checkpoints:
    """The checkpoints of one run, in one directory, the newest `keep` of them.

    Every process of a run calls the same methods in the same order. Call `close()` before the program ends: a save that
    is still being written at interpreter exit is lost (the one before it is not).
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to be kept")
        self._directory = epath.Path(directory)
        self._keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._damaged: set[int] = set()  # steps that restore() found damaged: replaced or removed by the next save

    def save(self, step: int, state: dict[str, jax.Array], metadata: dict) -> None:
        """Write `state` ({path: array}) and `metadata` (JSON) as checkpoint `step`, in the background.

        When it returns, every array has been checksummed and copied off the device, so the next training step may
        donate it. It waits for the save before. PRNG keys are passed as `jax.random.key_data`.

        Raises:
          ValueError: `step` is not newer than every sound checkpoint (nothing is overwritten; steps that `restore`
            found damaged are replaced), or a leaf cannot be stored.
          TypeError: `metadata` is not JSON.
          OSError: the save before this one, or the start of this one, failed (a full disk). Older checkpoints stay.
        """
        self.wait()
        step = int(step)
        sound = self._sound()
        if sound and step <= sound[-1]:
            raise ValueError(
                f"checkpoint {step} is not newer than checkpoint {sound[-1]} in {self._directory}: a checkpoint is "
                "never overwritten; save a later step, rewind() to an earlier one, or use another directory"
            )
        manifest = _manifest(step, state, metadata)
        if jax.process_index() == 0:
            for leftover in self._unfinished():
                leftover.rmtree()
        try:
            with _writing():
                response = orbax.save_async(
                    self._path(step),
                    {path: array for path, array in state.items() if array.size},  # orbax refuses empty arrays
                    overwrite=step in self._damaged,
                    custom_metadata=manifest,
                )
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = self._writer.submit(self._finish, step, response)

    def wait(self) -> None:
        """Block until the save in progress is committed and surplus checkpoints are gone.

        Raises:
          OSError: the save failed; raised once. Its remains are removed, earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; a save in progress is not among them."""
        if not self._directory.exists():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def restore(
        self, target: dict[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> tuple[int, dict[str, jax.Array], dict] | None:
        """The newest sound checkpoint as (step, {path: array}, metadata), or None where nothing was ever saved.

        `target` names every path with its shape, dtype and, optionally, its sharding on whatever mesh this run has;
        without a sharding a leaf goes to the default device. Damaged checkpoints and the remains of interrupted saves
        are named in a warning and passed over. With `step`, it is that checkpoint or an error.

        Raises:
          ValueError: the checkpoint is sound but does not hold exactly the paths, shapes and dtypes of `target` (each
            difference is listed), a sharding does not divide its leaf, or no checkpoint is sound.
          FileNotFoundError: there is no checkpoint `step`.
        """
        self.wait()
        for leftover in self._unfinished():
            warnings.warn(f"{leftover} was never finished, or is still being written; it is ignored", stacklevel=2)
        steps = self.steps()
        if step is not None and step not in steps:
            raise FileNotFoundError(f"there is no checkpoint {step} in {self._directory}, only {steps}")
        damages = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                arrays, metadata = self._read(candidate, target)
                return candidate, arrays, metadata
            except _Damaged as damage:
                self._damaged.add(candidate)
                damages.append(f"checkpoint {candidate} in {self._directory} is damaged: {damage}")
                warnings.warn(damages[-1], stacklevel=2)
        if damages:
            raise ValueError(
                "\n".join([*damages, "None is sound: put back a copy, or move the directory to start anew."])
            )
        return None

    def rewind(self, step: int) -> None:
        """Remove every checkpoint after `step`, for a run that goes on from there and will save those steps again."""
        self.wait()
        if jax.process_index() == 0:
            for later in [saved for saved in self.steps() if saved > step]:
                self._path(later).rmtree()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints rewound")

    def close(self) -> None:
        """Finish the save in progress, raising what it raised, and stop the background thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _sound(self) -> list[int]:
        """Committed steps less those that restore() found damaged."""
        return [step for step in self.steps() if step not in self._damaged]

    def _unfinished(self) -> list[epath.Path]:
        if not self._directory.exists():
            return []
        return sorted(path for path in self._directory.iterdir() if _TEMPORARY in path.name)

    def _failure(self, step: int, error: Exception) -> OSError:
        sound = [saved for saved in self._sound() if saved != step]
        kept = f"checkpoint {sound[-1]} is the newest that is intact" if sound else "there is no earlier one"
        failure = OSError(f"checkpoint {step} in {self._directory} could not be written ({kept}): {error}")
        failure.errno = getattr(error, "errno", None)
        return failure

    def _finish(self, step: int, response: orbax.AsyncResponse) -> None:
        """In the background: wait for the commit, then remove what is surplus. Only a committed save removes others."""
        try:
            response.result()
        except Exception as error:  # whatever the storage layer raises, the caller needs one kind of answer
            if jax.process_index() == 0:
                for leftover in self._unfinished():
                    _remove(leftover)
            raise self._failure(step, error) from error
        self._damaged.discard(step)
        if jax.process_index() == 0:
            for surplus in [*self._sound()[: -self._keep], *sorted(self._damaged)]:
                _remove(self._path(surplus))
        self._damaged.clear()

    def _read(self, step: int, target: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], dict]:
        """Arrays and metadata of one checkpoint, verified."""
        try:
            stored = orbax.checkpointables_metadata(self._path(step)).custom_metadata
            digest, manifest = stored["sha256"], json.loads(stored["manifest"])
            if digest != hashlib.sha256(stored["manifest"].encode()).hexdigest():
                raise ValueError("its digest differs")
        except Exception as error:
            raise _Damaged(f"its manifest cannot be trusted ({_brief(error)})") from error
        if manifest["step"] != step:
            raise _Damaged(f"it holds step {manifest['step']}")
        leaves = manifest["leaves"]
        _check_target(target, leaves, f"checkpoint {step} in {self._directory}")
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
            for path, leaf in target.items()
        }
        try:
            arrays = orbax.load(self._path(step), {path: leaf for path, leaf in placed.items() if leaf.size})
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # a device that is full says nothing about the checkpoint
        except Exception as error:
            raise _Damaged(f"its arrays cannot be read ({_brief(error)})") from error
        arrays |= {
            path: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            for path, leaf in placed.items()
            if not leaf.size
        }
        sums = _checksums(arrays)
        if changed := [path for path in target if sums[path] != leaves[path]["checksum"]]:
            raise _Damaged(f"checksums differ for {_enumerate(changed)}")
        return {path: arrays[path] for path in target}, manifest["metadata"]


def _writing() -> orbax.Context:
    """How orbax writes: directories before save() returns, since made in the background they keep a program that ends
    early waiting for minutes; and uncompressed, since trained weights hardly shrink and the loop needs the cores."""
    context = orbax.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False
    return context


def _remove(directory: epath.Path) -> None:
    try:
        directory.rmtree()
    except OSError as error:
        warnings.warn(f"{directory} is surplus but could not be removed: {error}", stacklevel=2)


def _manifest(step: int, state: dict[str, jax.Array], metadata: dict) -> dict[str, str]:
    """Everything that restore() relies on besides the bytes, as JSON text with its own digest."""
    for path, array in state.items():
        if not isinstance(array, jax.Array):
            raise ValueError(f"{path}: a {type(array).__name__} where a jax.Array is expected")
        if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
            raise ValueError(f"{path}: dtype {array.dtype} cannot be stored (keys: pass jax.random.key_data)")
    leaves = {
        path: {"shape": list(state[path].shape), "dtype": str(state[path].dtype), "checksum": checksum}
        for path, checksum in _checksums(state).items()
    }
    text = json.dumps({"step": step, "metadata": metadata, "leaves": leaves})
    return {"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _check_target(target: dict[str, jax.ShapeDtypeStruct], leaves: dict[str, dict], where: str) -> None:
    if differences := list(_differences(target, leaves)):
        raise ValueError(f"{where} does not fit what is to be restored:\n  " + "\n  ".join(differences))
    for path, leaf in target.items():
        if leaf.sharding is not None:
            try:
                leaf.sharding.shard_shape(leaf.shape)
            except ValueError as error:
                raise ValueError(f"{path} {list(leaf.shape)} cannot be sharded as {leaf.sharding}: {error}") from error


def _differences(target: dict[str, jax.ShapeDtypeStruct], leaves: dict[str, dict]) -> Iterator[str]:
    for path, leaf in target.items():
        expected = f"{leaf.dtype} {list(leaf.shape)}"
        if path not in leaves:
            nearest = difflib.get_close_matches(path, leaves.keys() - target.keys(), n=1)
            hint = f" (nearest stored and not expected: {nearest[0]})" if nearest else ""
            yield f"{path}: not stored, expected {expected}{hint}"
        elif (stored := f"{leaves[path]['dtype']} {leaves[path]['shape']}") != expected:
            yield f"{path}: stored {stored}, expected {expected}"
    for path in leaves.keys() - target.keys():
        yield f"{path}: stored {leaves[path]['dtype']} {leaves[path]['shape']}, not expected"


def _brief(error: Exception) -> str:
    """The storage layer's messages run to kilobytes; the whole of it is in the exception's cause."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]


def _enumerate(paths: list[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """Checksum of every leaf as sixteen hexadecimal digits; one transfer for all of them."""
    lanes = jax.device_get({path: _checksum(array) for path, array in arrays.items()})
    return {path: "".join(f"{lane:08x}" for lane in pair.tolist()) for path, pair in lanes.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sums c_0 and c_1 of the module's docstring: uint32 [2]."""
    words = _words(array)
    index = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):  # the position in row-major order, without a reshape, which would undo a sharding
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        index = index + stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _murmur(np.uint32(0x9E3779B1) * index ^ words)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum((2 * index + 1) * mixed, dtype=jnp.uint32)])


def _words(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32; those of 64-bit elements along a last axis of two."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        width = min(jnp.finfo(array.dtype).bits, 32)
        array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}"))
    elif array.dtype.itemsize == 8:
        array = jax.lax.bitcast_convert_type(array, jnp.uint32)
    return array.astype(jnp.uint32)


def _murmur(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
