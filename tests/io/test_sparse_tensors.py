"""Sparse storage: exact round trips, sizes by formula, and whatever is smallest."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Masked, arrays, flatten
from jaxlm.evaluate.cost import bytes_on_disk
from jaxlm.io.lm import LM
from jaxlm.io.model_directory import OWN, open_model
from jaxlm.io.safetensors import SINGLE, Tensor, open_file, write_file
from jaxlm.io.sparse_tensors import compress, expand
from jaxlm.methods.bake import bake
from jaxlm.methods.prune.unstructured.magnitude import prune_magnitude
from jaxlm.methods.prune.unstructured.patterns import keep
from jaxlm.methods.share.clustering import cluster
from jaxlm.models import model_config

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8]
N, SHAPE = 64 * 48, (64, 48)


def values(dtype, seed=0):
    """No entry is zero."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 100, SHAPE) * rng.choice([-1, 1], SHAPE)).astype(dtype)


def pruned(dtype, sparsity=None, pattern="unstructured"):
    dense = values(dtype)
    mask = np.asarray(keep(jnp.asarray(np.random.default_rng(1).random(SHAPE)), sparsity, pattern))
    return np.where(mask, dense, np.zeros((), dtype)), mask


def through(tensors, tmp_path):
    """What comes back from disk, what is stored, and the descriptions."""
    stored, described = compress({name: Tensor.of(array, name) for name, array in tensors.items()})
    write_file(tmp_path / "file.safetensors", stored)
    expanded = expand(open_file(tmp_path / "file.safetensors"), json.loads(json.dumps(described)), tmp_path / "x.json")
    assert expanded.keys() == tensors.keys()
    for name, array in tensors.items():
        again = expanded[name].read()
        assert again.dtype == array.dtype == expanded[name].dtype
        assert again.shape == array.shape == expanded[name].shape
        assert again.tobytes() == array.tobytes(), name
    return expanded, stored, described


def nbytes(stored):
    return sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.97])
def test_a_bit_an_entry_and_the_values(dtype, sparsity, tmp_path):
    array, mask = pruned(dtype, sparsity)
    _, stored, described = through({"w": array}, tmp_path)
    kept = N - round(sparsity * N)
    form = described["w"]["support"]
    if sparsity < 0.9:
        assert form == "bits" and nbytes(stored) == N // 8 + kept * array.dtype.itemsize
    assert nbytes(stored) < array.nbytes and mask.sum() == kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pattern", "place"), [("2:4", 2), ("1:4", 2), ("1:8", 3), ("2:16", 4)])
def test_places_in_groups_and_the_values(dtype, pattern, place, tmp_path):
    array, mask = pruned(dtype, pattern=pattern)
    _, stored, described = through({"w": array}, tmp_path)
    kept, group = map(int, pattern.split(":"))
    count = N * kept // group
    assert mask.sum() == count and described["w"]["support"] == pattern
    assert nbytes(stored) == -(-count * place // 8) + count * array.dtype.itemsize < array.nbytes
    assert nbytes(stored) <= N // 8 + count * array.dtype.itemsize, "never more than bits"


def test_a_group_that_is_not_full_is_filled_up(tmp_path):
    array, _ = pruned(np.float32, pattern="1:8")
    array[:8, 0] = 0
    _, stored, described = through({"w": array}, tmp_path)
    assert described["w"]["support"] == "1:8" and stored["w#values"].shape == (N // 8,)


@pytest.mark.parametrize("what", ["dense", "zeros", "minus zero", "vector", "small"])
def test_what_gains_nothing_stays_and_everything_comes_back(what, tmp_path):
    array = {
        "dense": values(np.float32),
        "zeros": np.zeros(SHAPE, np.float32),
        "minus zero": np.where(np.arange(N).reshape(SHAPE) % 3, np.float32(0), np.float32("-0.0")),
        "vector": np.zeros(N, np.float32),
        "small": np.zeros((4, 4), np.float32),
    }[what]
    _, stored, described = through({"w": array}, tmp_path)
    assert bool(described) == (what in ("zeros", "minus zero"))
    assert ("w" in stored) == (not described)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_weight_stores_its_mask_once(dtype, tmp_path):
    array, mask = pruned(dtype, 0.5)
    _, stored, described = through({"w.mask": mask, "w.base": array}, tmp_path)
    assert described["w.base"]["support"] == "like w.mask" and described["w.mask"]["support"] == "bits"
    assert nbytes(stored) == N // 8 + N // 2 * array.dtype.itemsize
    assert through({"w.base": array, "w.mask": mask}, tmp_path)[1].keys() == stored.keys(), "in any order"


def test_what_a_mask_hides_is_not_lost(tmp_path):
    dense, (_, mask) = values(np.float32), pruned(np.float32, 0.5)
    _, stored, described = through({"w.base": dense, "w.mask": mask}, tmp_path)
    assert "w.base" in stored and list(described) == ["w.mask"]


@pytest.mark.parametrize(("largest", "bits"), [(1, 1), (3, 2), (15, 4), (16, 5), (127, 7)])
def test_codes_take_as_many_bits_as_they_need(largest, bits, tmp_path):
    codes = np.random.default_rng(0).integers(1, largest + 1, SHAPE).astype(np.uint8)
    codes[0, 0] = largest
    _, stored, described = through({"codes": codes}, tmp_path)
    assert described["codes"]["packed"] == bits and nbytes(stored) == N * bits // 8


@pytest.mark.parametrize("pattern", ["unstructured", "1:4"])
def test_masks_alone(pattern, tmp_path):
    _, mask = pruned(np.float32, 0.75, pattern)
    _, stored, described = through({"m": mask}, tmp_path)
    assert described["m"]["support"] == ("bits" if pattern == "unstructured" else "1:4")
    assert nbytes(stored) == (N // 8 if pattern == "unstructured" else N // 4 * 2 // 8)


def test_converted_while_it_is_read(tmp_path):
    array, _ = pruned(np.float32, 0.8)
    expanded, _, _ = through({"w": array}, tmp_path)
    assert np.array_equal(expanded["w"].cast(ml_dtypes.bfloat16).read(), array.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d["w"].update(support="5"), "'w' cannot be unpacked"),
        (lambda d, t: d["w"].update(support="3:5"), "64 inputs are not groups of 5"),
        (lambda d, t: d["w"].update(support="like nothing"), "'w' cannot be unpacked"),
        (lambda d, t: d["w"].update(dtype="os"), "'w' cannot be unpacked"),
        (lambda d, t: d["w"].update(shape=[64, 49]), r"'w#support' is uint8 \[384\], expected uint8 \[392\]"),
        (lambda d, t: t.pop("w#values"), "the tensor 'w#values' is missing"),
    ],
)
def test_damage_is_named(change, message, tmp_path):
    array, _ = pruned(np.float32, 0.5)
    tensors, described = compress({"w": Tensor.of(array, "w")})
    change(described, tensors)
    with pytest.raises(ValueError, match=message) as error:
        expand(tensors, described, tmp_path / OWN)
    assert str(tmp_path / OWN) in str(error.value)


def test_too_few_values_are_named(tmp_path):
    array, _ = pruned(np.float32, 0.5)
    tensors, described = compress({"w": Tensor.of(array, "w")})
    tensors["w#values"] = Tensor.of(tensors["w#values"].read()[:-1], "w")
    with pytest.raises(ValueError, match="'w' has 1535 values for 1536 places: it is damaged"):
        expand(tensors, described, tmp_path)["w"].read()


# Model directories ---------------------------------------------------------------------------------------------------


def small():
    config = model_config("gpt2", vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, max_positions=16)
    return LM.initialize(config, jax.random.key(0))


def same(a, b):
    one, other = arrays(a.params), arrays(b.params)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert np.asarray(value).tobytes() == np.asarray(other[name]).tobytes(), name


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pruned_model_is_smaller_on_disk(pattern, dtype, tmp_path):
    lm = prune_magnitude(small(), sparsity=0.5, pattern=pattern)
    assert "transformers has no Masked" in jaxlm.save(lm, tmp_path / "sparse", dtype=dtype)
    jaxlm.save(small(), tmp_path / "dense", dtype=dtype)
    again = jaxlm.load(tmp_path / "sparse")
    assert all(isinstance(leaf, Masked) for path, leaf in flatten(again.params).items() if path.endswith("kernel"))
    jaxlm.save(again, tmp_path / "again")
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "sparse" / SINGLE).read_bytes()
    same(jaxlm.load(tmp_path / "again"), again)
    kernels = sum(leaf.mask.size for path, leaf in flatten(again.params).items() if path.endswith("kernel"))
    gained = kernels * jnp.dtype(dtype).itemsize // 2 - kernels // 8
    names = 300 * len(arrays(again.params))
    assert gained - names < bytes_on_disk(tmp_path / "dense") - bytes_on_disk(tmp_path / "sparse") <= gained + names
    assert bytes_on_disk(tmp_path / "sparse") < bytes_on_disk(tmp_path / "dense")


def test_zeros_of_plain_arrays_in_the_native_layout_alone(tmp_path):
    plain = bake(prune_magnitude(small(), sparsity=0.9))
    assert jaxlm.save(plain, tmp_path / "hf") is None
    jaxlm.save(plain, tmp_path / "native", native=True)
    assert bytes_on_disk(tmp_path / "native") < 0.6 * bytes_on_disk(tmp_path / "hf")
    for name in ("hf", "native"):
        same(jaxlm.load(tmp_path / name), plain)
    assert "sparse" in json.loads((tmp_path / "native" / OWN).read_text())
    assert "sparse" not in json.loads((tmp_path / "hf" / OWN).read_text())


def test_clustered_models_take_few_bits(tmp_path):
    lm = cluster(small(), values=16)
    jaxlm.save(lm, tmp_path)
    same(jaxlm.load(tmp_path), lm)
    sparse = json.loads((tmp_path / OWN).read_text())["sparse"]
    assert {description["packed"] for description in sparse.values()} == {4}
    assert len(sparse) == 12, "six kernels in each of two layers"


def test_opening_a_sparse_model_reads_no_tensor(tmp_path, monkeypatch):
    jaxlm.save(prune_magnitude(small(), sparsity=0.9), tmp_path)
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("read a tensor"))
    open_model(tmp_path)
