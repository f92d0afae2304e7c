"""Adapters: what a model has beyond its base is stored, and base and adapter give the model back to the bit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxlm
from jaxlm.core import LM, Gate, Quantized, Scheme, arrays, flatten, unflatten
from jaxlm.io.model_directory import OWN
from jaxlm.io.safetensors import open_tensors
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.models import model_config

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "ffn_size": 12}
QUERY, UP, BIAS = "layers_0/attention/query/kernel", "layers_1/mlp/up/kernel", "layers_1/mlp_norm/scale"


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def base():
    return jaxlm.LM.initialize(model_config("llama", **SIZES), jax.random.key(0))


def changed(lm: LM, leaves: dict, axes: dict | None = None) -> LM:
    return lm.replace(params=unflatten(flatten(lm.params) | leaves), axes=lm.axes | (axes or {}))


def adapted(lm: LM) -> LM:
    """A wrapped matrix, a changed array, an added site, an added array and an added Weight."""
    flat = flatten(lm.params)
    leaves = {
        QUERY: LowRank(flat[QUERY], normal(1, 16, 2), normal(2, 2, 16), scale=0.5),
        BIAS: flat[BIAS].at[3].set(-0.0),
        "layers_0/mlp/gate": Gate(normal(3, 12)),
        "prompt": normal(4, 5, 16),
        "layers_0/bottleneck/down": LowRank(normal(5, 16, 4), normal(6, 16, 1), normal(7, 1, 4)),
    }
    axes = {
        "layers_0/mlp/gate": ("ffn",),
        "prompt": (None, "embed"),
        "layers_0/bottleneck/down": ("embed", None),
    }
    return changed(lm, leaves, axes)


def same(a: LM, b: LM) -> None:
    first, second = arrays(a.params), arrays(b.params)
    assert first.keys() == second.keys() and a.axes == b.axes and a.config == b.config
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert np.asarray(array).tobytes() == np.asarray(second[name]).tobytes(), name
    leaves = [flatten(lm.params) for lm in (a, b)]
    assert jax.tree.structure(leaves[0]) == jax.tree.structure(leaves[1]), "static fields too"


def test_only_what_is_beyond_the_base_is_stored(base, tmp_path):
    jaxlm.save(base, tmp_path / "base")
    lm = adapted(base)
    assert jaxlm.save(lm, tmp_path / "adapter", base=tmp_path / "base") == "an adapter"
    assert open_tensors(tmp_path / "adapter").keys() == {
        f"{QUERY}.a",
        f"{QUERY}.b",
        BIAS,
        "layers_0/mlp/gate.value",
        "prompt",
        *(f"layers_0/bottleneck/down.{field}" for field in ("base", "a", "b")),
    }
    same(jaxlm.load(tmp_path / "adapter"), lm)


def test_the_base_in_memory_is_shared(base, tmp_path):
    lm = adapted(base)
    jaxlm.save(lm, tmp_path / "adapter", base=base)
    again = jaxlm.load(tmp_path / "adapter", base=base)
    same(again, lm)
    table = "embed/tokens/embedding"
    assert arrays(again.params)[table] is arrays(base.params)[table]
    with pytest.raises(ValueError, match="does not say of which model"):
        jaxlm.load(tmp_path / "adapter")


def test_directories_move_together(base, tmp_path, monkeypatch):
    jaxlm.save(base, tmp_path / "here/base")
    monkeypatch.chdir(tmp_path)
    jaxlm.save(adapted(base), "here/adapter", base="here/base")
    (tmp_path / "here").rename(tmp_path / "there")
    same(jaxlm.load(tmp_path / "there/adapter"), adapted(base))


def test_an_adapter_on_an_adapter(base, tmp_path):
    jaxlm.save(base, tmp_path / "base")
    first = adapted(base)
    jaxlm.save(first, tmp_path / "first", base=tmp_path / "base")
    inner = flatten(first.params)[QUERY]
    second = changed(first, {QUERY: LowRank(inner, normal(8, 16, 1), normal(9, 1, 16))})
    jaxlm.save(second, tmp_path / "second", base=tmp_path / "first")
    assert open_tensors(tmp_path / "second").keys() == {f"{QUERY}.a", f"{QUERY}.b"}
    same(jaxlm.load(tmp_path / "second"), second)


def test_the_base_may_be_quantized(base, tmp_path):
    up = flatten(base.params)[UP]
    small = changed(base, {UP: Quantized.of(up, Scheme("nf4", 8))})
    jaxlm.save(small, tmp_path / "base")
    lm = changed(small, {UP: LowRank(flatten(small.params)[UP], normal(1, 16, 2), normal(2, 2, 12))})
    jaxlm.save(lm, tmp_path / "adapter", base=tmp_path / "base")
    assert open_tensors(tmp_path / "adapter").keys() == {f"{UP}.a", f"{UP}.b"}
    same(jaxlm.load(tmp_path / "adapter"), lm)


def test_a_base_that_trained_in_another_dtype_is_still_the_base(base, tmp_path):
    jaxlm.save(base, tmp_path / "base", dtype=ml_dtypes.bfloat16)
    wide = jaxlm.load(tmp_path / "base", dtype=jnp.float32)
    lm = adapted(wide)
    jaxlm.save(lm, tmp_path / "adapter", base=tmp_path / "base")
    assert len(open_tensors(tmp_path / "adapter")) == 8
    same(jaxlm.load(tmp_path / "adapter"), lm)


def test_another_head_is_beyond_the_base(base, tmp_path):
    jaxlm.save(base, tmp_path / "base")
    lm = jaxlm.load(tmp_path / "base", head="sequence", labels=("a", "b"))
    jaxlm.save(lm, tmp_path / "adapter", base=tmp_path / "base")
    assert open_tensors(tmp_path / "adapter").keys() == {"head/output/kernel"}
    same(jaxlm.load(tmp_path / "adapter").replace(fresh=lm.fresh, dropped=lm.dropped), lm)


def test_another_model_is_refused(base, tmp_path):
    jaxlm.save(base, tmp_path / "base")
    jaxlm.save(adapted(base), tmp_path / "adapter", base=tmp_path / "base")
    other = jaxlm.LM.initialize(base.config, jax.random.key(1))
    for directory in (tmp_path / "adapter", tmp_path / "base"):
        if directory.name == "base":
            jaxlm.save(other, directory)
        with pytest.raises(ValueError, match="adapter belongs to a model whose parameters"):
            jaxlm.load(tmp_path / "adapter", base=other if directory.name == "adapter" else None)


def test_an_adapter_does_not_replace_its_base(base, tmp_path):
    jaxlm.save(base, tmp_path / "base")
    with pytest.raises(ValueError, match="is the base of the adapter"):
        jaxlm.save(adapted(base), tmp_path / "base", base=tmp_path / "base")
    same(jaxlm.load(tmp_path / "base"), base)


@pytest.mark.parametrize("path", ["../second", "../first"])
def test_an_adapter_that_stands_on_itself_is_refused(base, tmp_path, path):
    jaxlm.save(base, tmp_path / "base")
    jaxlm.save(adapted(base), tmp_path / "first", base=tmp_path / "base")
    second = changed(adapted(base), {"prompt": normal(9, 5, 16)})
    jaxlm.save(second, tmp_path / "second", base=tmp_path / "first")
    file = tmp_path / "first" / OWN
    described = json.loads(file.read_text())
    described["base"]["path"] = path
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="which stands on it"):
        jaxlm.load(tmp_path / "second")


def test_no_base_is_fetched_without_being_asked_for(base, tmp_path, monkeypatch):
    jaxlm.save(base, tmp_path / "base")
    jaxlm.save(adapted(base), tmp_path / "adapter", base=tmp_path / "base")
    file = tmp_path / "adapter" / OWN
    described = json.loads(file.read_text())
    described["base"]["path"] = "somebody/model"
    file.write_text(json.dumps(described))
    asked = []

    def snapshot_download(path, *, local_files_only, **_):
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"somebody/model, the base of an adapter, .*base="):
        jaxlm.load(tmp_path / "adapter")
    assert asked == [True]
    same(jaxlm.load(tmp_path / "adapter", base=base), adapted(base))


def test_nothing_beyond_the_base_is_no_adapter(base, tmp_path):
    with pytest.raises(ValueError, match="every parameter is the base's"):
        jaxlm.save(base, tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "base: expected"),
        ({"path": "../base", "sha256": 3}, "base: sha256"),
        ({"arrays": {QUERY: "layers_0"}}, "expected a"),
        ({"arrays": {QUERY: []}}, "unknown array of the base"),
        ({"arrays": {QUERY: ["layers_0/attention/query/kernal"]}}, "did you mean 'layers_0/attention/query/kernel'"),
        ({"arrays": {QUERY: [QUERY, "F33"]}}, "did you mean 'F32'"),
        ({"arrays": {}}, "lacks the tensor"),
        ({"path": "../nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_damaged_descriptions_are_refused(base, tmp_path, entry, message):
    jaxlm.save(base, tmp_path / "base")
    jaxlm.save(adapted(base), tmp_path / "adapter", base=tmp_path / "base")
    file = tmp_path / "adapter" / OWN
    described = json.loads(file.read_text())
    described["base"] = entry and described["base"] | entry
    file.write_text(json.dumps(described))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        jaxlm.load(tmp_path / "adapter")
