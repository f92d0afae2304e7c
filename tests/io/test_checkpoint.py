"""Checkpoints survive donation, other meshes, kill -9, damage and a full disk, and never restore anything else."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.io.checkpoint import Checkpoints, _checksums

pytestmark = pytest.mark.slow


def mesh_of(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("x", "y")[: len(shape)], axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def placed(shape, *spec):
    return jax.NamedSharding(mesh_of(*shape), jax.P(*spec))


def structs(state, sharding=None):
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for path, leaf in state.items()}


def same_bits(restored, state):
    for path, leaf in state.items():
        assert restored[path].dtype == leaf.dtype, path
        assert np.asarray(restored[path]).tobytes() == np.asarray(leaf).tobytes(), path
    return restored.keys() == state.keys()


@pytest.fixture
def state():
    key = jax.random.key(0)
    return {
        "params/layers_0/mlp/up/kernel": jax.random.normal(key, (16, 8)),
        "params/layers_0/mlp/up/bias": jnp.array([jnp.nan, -0.0, 1e-45]),
        "params/half": jnp.ones((3, 2), jnp.bfloat16),
        "codes": jnp.arange(-8, 8).astype(jnp.int4),
        "fp8": jnp.arange(4).astype(jnp.float8_e4m3fn),
        "mask": jnp.array([True, False]),
        "key": jax.random.key_data(key),
        "step": jnp.int32(7),
        "nothing": jnp.zeros((0, 4)),
    }


@pytest.fixture
def small():
    return {"w": jnp.arange(256.0).reshape(16, 16)}


def saved(directory, states, keep=10):
    checkpoints = Checkpoints(directory, keep)
    for step, state in states.items():
        checkpoints.save(step, state, {"position": step})
    checkpoints.close()


def test_every_dtype_and_the_metadata_come_back_bit_for_bit(tmp_path, state):
    metadata = {"position": 12, "versions": {"jax": "0.10.2"}, "best": [0.25, None]}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(structs(state)) is None
    checkpoints.save(3, state, metadata)
    step, restored, stored = checkpoints.restore(structs(state))
    assert step == 3 and stored == metadata and same_bits(restored, state)
    checkpoints.close()


@pytest.mark.parametrize("target", [((8,), ("x",)), ((4, 2), ("y", "x")), ((2,), (None, "x")), ((1,), ())])
def test_restores_onto_another_mesh_and_number_of_devices(tmp_path, small, target):
    state = {path: jax.device_put(leaf, placed((2, 4), "x", "y")) for path, leaf in small.items()}
    saved(tmp_path, {1: state})
    sharding = placed(target[0], *target[1])
    _, restored, _ = Checkpoints(tmp_path).restore(structs(state, sharding))
    assert restored["w"].sharding == sharding and same_bits(restored, small)


def test_donating_the_arrays_right_after_save_does_not_change_what_is_saved(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    shardings = {"sharded": placed((2, 4), "x", "y"), "partly": placed((2, 4), "x"), "replicated": placed((2, 4))}
    state = step({name: jax.device_put(jnp.zeros((512, 1024)), sharding) for name, sharding in shardings.items()})
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2, 3):
        expected = {name: np.full((512, 1024), number, np.float32) for name in shardings}
        checkpoints.save(number, state, {})
        for _ in range(number, number + 3):
            state = step(state)
        restored = checkpoints.restore(structs(state))
        assert restored[0] == number and same_bits(restored[1], expected)
        state = {name: jax.device_put(jnp.full((512, 1024), number + 1.0), s) for name, s in shardings.items()}
    checkpoints.close()


def test_keeps_the_newest(tmp_path, small):
    saved(tmp_path, dict.fromkeys((1, 2, 5, 10), small), keep=2)
    assert Checkpoints(tmp_path).steps() == [5, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]


def test_a_named_step(tmp_path, small):
    saved(tmp_path, {step: {"w": small["w"] + step} for step in (1, 2)})
    assert Checkpoints(tmp_path).restore(structs(small), step=1)[1]["w"][0, 0] == 1
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 3 .* \[1, 2\]"):
        Checkpoints(tmp_path).restore(structs(small), step=3)


@pytest.mark.parametrize("step", [4, 5])
def test_an_older_or_equal_step_is_refused_and_changes_nothing(tmp_path, small, step):
    saved(tmp_path, {5: small})
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=f"checkpoint {step} is not newer than checkpoint 5"):
        checkpoints.save(step, {"w": -small["w"]}, {})
    assert checkpoints.steps() == [5] and same_bits(checkpoints.restore(structs(small))[1], small)


def test_rewinding_lets_later_steps_be_saved_again(tmp_path, small):
    saved(tmp_path, dict.fromkeys((1, 5, 7), small))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.rewind(4)
    assert checkpoints.steps() == [1]
    checkpoints.save(5, {"w": -small["w"]}, {})
    assert same_bits(checkpoints.restore(structs(small))[1], {"w": -small["w"]})
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b"), r"b: stored float32 \[3\], not expected"),
        (lambda t: t.update(extra=t["b"]), r"extra: not stored, expected float32 \[3\]"),
        (lambda t: t.update(layer=t.pop("layers")), r"layer: not stored.*nearest stored and not expected: layers"),
        (
            lambda t: t.update(b=jax.ShapeDtypeStruct((4,), jnp.float32)),
            r"b: stored float32 \[3\], expected float32 \[4",
        ),
        (lambda t: t.update(b=jax.ShapeDtypeStruct((3,), jnp.bfloat16)), r"b: stored float32 \[3\], expected bfloat16"),
        (
            lambda t: t.update(b=jax.ShapeDtypeStruct((3,), jnp.float32, sharding=placed((2,), "x"))),
            r"b \[3\] cannot be",
        ),
    ],
)
def test_a_target_that_differs_is_refused_by_path_and_older_checkpoints_are_not_tried(tmp_path, change, message):
    saved(tmp_path, {step: {"b": jnp.ones(3), "layers": jnp.ones(2)} for step in (1, 2)})
    target = structs({"b": jnp.ones(3), "layers": jnp.ones(2)})
    change(target)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("error")
        Checkpoints(tmp_path).restore(target)


@pytest.mark.parametrize(
    ("state", "metadata", "error", "message"),
    [
        ({"w": np.ones(2)}, {}, ValueError, "w: a ndarray"),
        ({"key": lambda: jax.random.key(0)}, {}, ValueError, "key: dtype key<fry> cannot be stored"),
        ({"w": lambda: jnp.ones(2)}, {"rate": np.float32(1)}, TypeError, "float32 is not JSON serializable"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, state, metadata, error, message):
    state = {path: leaf() if callable(leaf) else leaf for path, leaf in state.items()}
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path / "new").save(1, state, metadata)
    assert not (tmp_path / "new").exists()


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(directory):
    path = largest_file(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(directory):
    os.truncate(largest_file(directory), largest_file(directory).stat().st_size // 2)


def forge_the_position(directory):
    path = directory / "_CHECKPOINT_METADATA"
    assert '\\"position\\": 2' in path.read_text()
    path.write_text(path.read_text().replace('\\"position\\": 2', '\\"position\\": 3'))


DAMAGES = {
    "bit": (flip_a_bit, "checksums differ for w"),
    "truncated": (truncate, "its arrays cannot be read"),
    "missing": (lambda directory: largest_file(directory).unlink(), "its arrays cannot be read"),
    "all arrays": (lambda directory: shutil.rmtree(directory / "state"), "cannot be"),
    "manifest": (lambda directory: (directory / "_CHECKPOINT_METADATA").unlink(), "its manifest cannot be trusted"),
    "position": (forge_the_position, "its digest differs"),
    "renamed": (lambda d: (shutil.rmtree(d), shutil.copytree(d.parent / "1", d)), "it holds step 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_passed_over_and_replaced(tmp_path, small, damage):
    saved(tmp_path, {1: small, 2: {"w": small["w"] + 1}})
    make, reason = DAMAGES[damage]
    make(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.warns(UserWarning, match=f"checkpoint 2 in .* is damaged: .*{reason}"):
        step, restored, metadata = checkpoints.restore(structs(small))
    assert step == 1 and metadata == {"position": 1} and same_bits(restored, small)
    checkpoints.save(2, {"w": small["w"] + 2}, {"position": 2})
    checkpoints.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, restored, _ = Checkpoints(tmp_path).restore(structs(small))
    assert step == 2 and same_bits(restored, {"w": small["w"] + 2})


def test_a_damaged_checkpoint_does_not_count_as_kept_and_goes_with_the_next_save(tmp_path, small):
    saved(tmp_path, {1: small, 10: small})
    flip_a_bit(tmp_path / "10")
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.warns(UserWarning, match="checkpoint 10"):
        checkpoints.restore(structs(small))
    checkpoints.save(4, small, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


def test_when_nothing_is_sound_each_is_named(tmp_path, small):
    saved(tmp_path, {1: small, 2: small})
    flip_a_bit(tmp_path / "1")
    truncate(tmp_path / "2")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"(?s)checkpoint 2 .*checkpoint 1 .*None is sound"):
        Checkpoints(tmp_path).restore(structs(small))


@pytest.fixture
def file_size_limit():
    """Writes beyond 64 KB fail in the operating system, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("then", ["wait", "save", "close"])
def test_a_write_that_fails_surfaces_and_destroys_nothing(tmp_path, small, file_size_limit, then):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small, {})
    checkpoints.wait()
    file_size_limit()
    checkpoints.save(2, {"w": jnp.ones((256, 256))}, {})
    call = {"wait": checkpoints.wait, "close": checkpoints.close, "save": lambda: checkpoints.save(3, small, {})}[then]
    with pytest.raises(OSError, match=r"checkpoint 2 in .* could not be written \(checkpoint 1 is .* intact\)"):
        call()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    again = Checkpoints(tmp_path, keep=1) if then == "close" else checkpoints
    again.save(3, small, {})
    again.close()
    assert again.steps() == [3]


CHILD = """
import sys, jax, jax.numpy as jnp
from jaxlm.io.checkpoint import Checkpoints
assert jax.device_count() == 1
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 100):
    checkpoints.save(step, {"w": jnp.full((4096, 4096), step, jnp.float32)}, {"position": step})
"""


def test_kill_9_during_a_save_leaves_the_checkpoint_before_it(tmp_path):
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], cwd=root, env=os.environ | {"XLA_FLAGS": ""})
    deadline = time.monotonic() + 60
    while True:  # stop it, look, and kill it only if that is in the middle of a save with another one before it
        assert child.poll() is None and time.monotonic() < deadline
        child.send_signal(signal.SIGSTOP)
        unfinished = list(tmp_path.glob("*tmp"))
        if unfinished and any(path.name.isdecimal() for path in tmp_path.iterdir()):
            break
        child.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    checkpoints = Checkpoints(tmp_path)
    newest = checkpoints.steps()[-1]
    target = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=placed((8,), "x"))}
    with pytest.warns(UserWarning, match=f"{unfinished[0].name} was never finished"):
        step, restored, metadata = checkpoints.restore(target)
    assert step == newest and metadata == {"position": newest} and bool((restored["w"] == newest).all())
    checkpoints.save(newest + 1, {"w": jnp.ones(2)}, {})
    checkpoints.close()
    assert not unfinished[0].exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_checksums_do_not_depend_on_the_sharding(dtype):
    leaf = (jax.random.normal(jax.random.key(1), (16, 8, 4)) * 3).astype(dtype)
    shardings = [placed((2, 4), *spec) for spec in [("x",), (None, "y", "x"), (("x", "y"),)]]
    sums = {_checksums({"leaf": jax.device_put(leaf, sharding)})["leaf"] for sharding in shardings}
    assert len(sums) == 1 and sums == {_checksums({"leaf": leaf})["leaf"]}


@functools.cache
def checksum_of(dtype):
    leaf = np.asarray((jax.random.normal(jax.random.key(2), (8, 4)) * 9).astype(dtype))
    return leaf, _checksums({"leaf": jnp.asarray(leaf)})["leaf"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["float32", "bfloat16", "int8", "int32"]), st.data())
def test_checksums_see_every_flipped_bit_and_every_exchange(dtype, data):
    leaf, checksum = checksum_of(dtype)
    flipped = bytearray(leaf.tobytes())
    position = data.draw(st.integers(0, len(flipped) - 1))
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    changed = np.frombuffer(bytes(flipped), leaf.dtype).reshape(leaf.shape)
    assert _checksums({"leaf": jnp.asarray(changed)})["leaf"] != checksum
    order = data.draw(st.permutations(range(leaf.size)))
    exchanged = leaf.reshape(-1)[list(order)].reshape(leaf.shape)
    if exchanged.tobytes() != leaf.tobytes():
        assert _checksums({"leaf": jnp.asarray(exchanged)})["leaf"] != checksum


def test_checksum_against_its_formula():
    words = [0x3F800000, 0, 0x80000000]  # 1.0, 0.0, -0.0
    mask = 2**32 - 1

    def murmur(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B & mask
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    mixed = [murmur(0x9E3779B1 * i & mask ^ word) for i, word in enumerate(words)]
    expected = f"{sum(mixed) & mask:08x}{sum((2 * i + 1) * m for i, m in enumerate(mixed)) & mask:08x}"
    assert _checksums({"leaf": jnp.array([1.0, 0.0, -0.0])})["leaf"] == expected


def test_the_manifest_is_readable_without_jaxlm(tmp_path, small):
    saved(tmp_path, {1: small})
    manifest = json.loads(json.loads((tmp_path / "1/_CHECKPOINT_METADATA").read_text())["custom_metadata"]["manifest"])
    assert manifest["step"] == 1 and manifest["metadata"] == {"position": 1}
    assert manifest["leaves"]["w"] == {"shape": [16, 16], "dtype": "float32", "checksum": _checksums(small)["w"]}


def test_keep_is_positive(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
