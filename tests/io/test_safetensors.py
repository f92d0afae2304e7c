import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.io.safetensors import INDEX, SINGLE, Tensor, open_file, open_tensors, write_tensors


def values():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal((5,)).astype(np.float16),
        "c": rng.integers(-100, 100, (2, 3, 2)).astype(np.int8),
        "d": np.array([True, False, True]),
        "e": rng.standard_normal((4, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def write(directory, arrays, **options):
    write_tensors(directory, {name: Tensor.of(value, name) for name, value in arrays.items()}, **options)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert (tensors[name].shape, tensors[name].dtype) == (value.shape, value.dtype)
        assert tensors[name].read().tobytes() == value.tobytes()


def test_round_trip(tmp_path):
    write(tmp_path, values())
    assert_same(open_tensors(tmp_path), values())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_safetensors_reads_what_is_written_and_the_reverse(tmp_path):
    plain = {name: value for name, value in values().items() if name != "e"}
    write(tmp_path, plain)
    theirs = load_file(tmp_path / SINGLE)
    assert all(np.array_equal(theirs[name], value) for name, value in plain.items())
    save_file(plain, tmp_path / SINGLE)
    assert_same(open_tensors(tmp_path), plain)


def test_shards(tmp_path):
    write(tmp_path, values(), max_shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values().values())
    assert_same(open_tensors(tmp_path), values())


def test_cast_while_reading_keeps_integers_and_equals_a_plain_cast(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.io.safetensors.BLOCK", 5)
    write(tmp_path, values())
    for name, tensor in open_tensors(tmp_path).items():
        narrow = tensor.cast(ml_dtypes.bfloat16)
        floating = values()[name].dtype.kind == "f" or name == "e"
        expected = values()[name].astype(ml_dtypes.bfloat16) if floating else values()[name]
        assert narrow.dtype == expected.dtype and narrow.read().tobytes() == expected.tobytes()
        assert Tensor.of(values()[name], name).cast(ml_dtypes.bfloat16).read().tobytes() == expected.tobytes()


def test_overflow_is_refused(tmp_path):
    write(tmp_path, {"big": np.array([1.0, 1e6, np.inf], np.float32)})
    with pytest.raises(ValueError, match=r"tensor 'big' of .*overflow float16"):
        open_tensors(tmp_path)["big"].cast(np.float16).read()


def test_interrupted_write_leaves_the_previous_file(tmp_path):
    def fail(dtype=None):
        raise KeyboardInterrupt

    write(tmp_path, {"a": np.ones(3, np.float32)})
    bad = {"a": Tensor.of(np.zeros(3, np.float32), "a"), "b": Tensor((3,), np.dtype(np.float32), fail)}
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, bad)
    assert_same(open_tensors(tmp_path), {"a": np.ones(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), r"truncated in tensor 'd'"),
        (lambda path: path.write_bytes(path.read_bytes() + b"xx"), r"its header describes"),
        (lambda path: path.write_bytes(b""), r"no safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), r"header of \d+ bytes cannot be"),
        (lambda path: path.write_bytes(b"\x80\x02}q\x00." * 20), r"but a pickle"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 20), r"but a pickle"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), r"pointer of Git LFS"),
        (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{{{{" + bytes(9)), r"its header is no JSON"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), r"no table of tensors"),
        (
            lambda path: rewrite_header(path, lambda h: h["a"].update(shape=[4, 4])),
            r"'a' lies at bytes 0 to 48, expected",
        ),
        (lambda path: rewrite_header(path, lambda h: h["a"].update(shape=[-3, -4])), r"'a' has the shape \[-3, -4\]"),
        (
            lambda path: rewrite_header(path, lambda h: h["a"].update(dtype="F31")),
            r"'a' has the dtype 'F31'; did you mean",
        ),
        (lambda path: rewrite_header(path, lambda h: h["a"].pop("dtype")), r"'a' needs dtype"),
        (lambda path: rewrite_header(path, lambda h: h.pop("a")), r"'scalar' lies at bytes 48 to 52, expected 0"),
    ],
)
def test_damaged_file(tmp_path, damage, message):
    write(tmp_path, values())
    damage(tmp_path / SINGLE)
    with pytest.raises(ValueError, match=message) as error:
        open_file(tmp_path / SINGLE)
    assert str(tmp_path / SINGLE) in str(error.value)


def test_damaged_shards(tmp_path):
    write(tmp_path, values(), max_shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())

    def with_map(weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    with_map({**index["weight_map"], "zzz": index["weight_map"]["a"]})
    with pytest.raises(ValueError, match=rf"{index['weight_map']['a']} has no tensor 'zzz'"):
        open_tensors(tmp_path)
    with_map({**index["weight_map"], "a": "../other.safetensors"})
    with pytest.raises(ValueError, match=r"expected the name of a \.safetensors file"):
        open_tensors(tmp_path)
    with_map(index["weight_map"])
    (tmp_path / index["weight_map"]["a"]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{index['weight_map']['a']} is missing.*'a'"):
        open_tensors(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match=f"{name}, a pickle"):
        open_tensors(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_tensors(tmp_path)
