import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import FakeQuant, Gate, Masked, Quantized, arrays, flatten, unflatten
from jaxlm.io.model_directory import CONFIG, OWN, open_model, write_model
from jaxlm.io.safetensors import SINGLE, Tensor, open_file, write_file
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.models import model_config


def small(family="gpt2", **fields):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 24}
    if family == "gpt2":
        sizes["max_positions"] = 16
    config = model_config(family, **{**sizes, **fields})
    return jaxlm.LM.initialize(config, jax.random.key(0))


def assert_equal(a, b):
    """Same config, same structure with all static fields, same arrays bit by bit."""
    assert a.config == b.config
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for name, value in arrays(a.params).items():
        other = arrays(b.params)[name]
        assert value.dtype == other.dtype and np.asarray(value).tobytes() == np.asarray(other).tobytes(), name


def compressed():
    """A ragged model with every Weight, nested ones and a gate."""
    lm = small(ffn_size=(24, 16), dropout=0.1)
    flat = flatten(lm.params)

    def kernel(path):
        return flat[f"layers_{path}/kernel"]

    up, down, key, value = (
        kernel("0/mlp/up"),
        kernel("1/mlp/down"),
        kernel("0/attention/key"),
        kernel("1/attention/value"),
    )
    a = jnp.ones((16, 2), jnp.float32)
    weights = {
        "layers_0/mlp/up/kernel": Quantized.of(up, dynamic=True),
        "layers_1/mlp/down/kernel": Masked(down, down > 0),
        "layers_0/attention/key/kernel": LowRank(Quantized.of(key), a, a.T, scale=0.5, rate=0.1),
        "layers_1/attention/value/kernel": FakeQuant.of(Masked(value, value > 0), dynamic=True),
        "embed/tokens/embedding": Quantized.of(flat["embed/tokens/embedding"], channel=-2),
        "layers_0/mlp/gate": Gate(jnp.arange(24, dtype=jnp.float32)),
    }
    axes = {"layers_0/mlp/gate": ("ffn",)}
    return lm.replace(params=unflatten({**flat, **weights}), axes=axes, carried={"eos_token_id": 3})


def test_plain_model_has_the_layout_of_transformers(tmp_path):
    lm = small(dropout=0.25, attention_dropout=0.125)
    assert jaxlm.save(lm, tmp_path / "m") is None
    hf = json.loads((tmp_path / "m" / CONFIG).read_text())
    assert hf["architectures"] == ["GPT2LMHeadModel"] and hf["n_inner"] == 24 and hf["dtype"] == "float32"
    assert "transformer.h.1.attn.c_attn.weight" in open_file(tmp_path / "m" / SINGLE)
    assert_equal(jaxlm.load(tmp_path / "m"), lm)


def test_what_transformers_cannot_say_is_kept_by_our_file(tmp_path):
    lm = small("llama", dropout=0.3)
    assert jaxlm.save(lm, tmp_path) is None
    assert jaxlm.load(tmp_path).config.dropout == 0.3
    hf = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(hf | {"rms_norm_eps": 0.5}))
    edited = jaxlm.load(tmp_path).config
    assert (edited.norm_eps, edited.dropout) == (0.5, 0.0)


def test_native_layout_keeps_every_weight_and_static_field(tmp_path):
    lm = compressed()
    assert "transformers has no Quantized" in jaxlm.save(lm, tmp_path)
    again = jaxlm.load(tmp_path)
    assert_equal(again, lm)
    assert again.axes["layers_0/mlp/gate"] == ("ffn",) and again.carried == {"eos_token_id": 3}
    batch = {"input_ids": np.arange(6).reshape(1, 6)}
    assert np.array_equal(again.apply(again.params, batch)["logits"], lm.apply(lm.params, batch)["logits"])


def test_ragged_layers_are_native(tmp_path):
    lm = small(ffn_size=(24, 8))
    assert "transformers needs the same ffn_size in all layers" in jaxlm.save(lm, tmp_path)
    assert_equal(jaxlm.load(tmp_path), lm)


def test_a_weight_makes_an_expressible_config_native(tmp_path):
    lm = small()
    path = "layers_0/mlp/up/kernel"
    flat = flatten(lm.params)
    lm = lm.replace(params=unflatten({**flat, path: Quantized.of(flat[path])}))
    assert jaxlm.save(lm, tmp_path) == f"transformers has no Quantized ({path})"


def test_dtype_leaves_scales_masks_and_codes_alone(tmp_path):
    jaxlm.save(compressed(), tmp_path, dtype=jnp.bfloat16)
    dtypes = {name: array.dtype for name, array in arrays(jaxlm.load(tmp_path).params).items()}
    assert dtypes["layers_0/mlp/up/kernel.codes"] == jnp.int8
    assert dtypes["layers_0/mlp/up/kernel.scale"] == jnp.float32
    assert dtypes["layers_1/mlp/down/kernel.base"] == jnp.bfloat16
    assert dtypes["layers_1/mlp/down/kernel.mask"] == jnp.bool_
    assert dtypes["layers_0/attention/key/kernel.a"] == jnp.bfloat16
    assert dtypes["layers_0/attention_norm/scale"] == jnp.bfloat16


def test_transformers_refuses_the_native_layout_plainly(tmp_path):
    from transformers import AutoConfig

    jaxlm.save(small(), tmp_path, native=True)
    with pytest.raises(ValueError, match="jaxlm"):
        AutoConfig.from_pretrained(tmp_path)


def test_shards_in_both_layouts(tmp_path):
    lm = small()
    for native in (False, True):
        jaxlm.save(lm, tmp_path, native=native, max_shard_bytes=4000)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert_equal(jaxlm.load(tmp_path), lm)


def test_saving_over_a_model_replaces_it_and_keeps_other_files(tmp_path):
    jaxlm.save(small(), tmp_path, max_shard_bytes=4000)
    (tmp_path / "notes.md").write_text("mine")
    other = small(num_layers=1)
    jaxlm.save(other, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, OWN, SINGLE, "notes.md"]
    assert_equal(jaxlm.load(tmp_path), other)
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")] == []


def test_saving_into_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds other files and no model"):
        jaxlm.save(small(), tmp_path)


def test_killed_save_leaves_the_previous_model(tmp_path):
    lm = small()
    jaxlm.save(lm, tmp_path / "m")

    def killed(dtype=None):
        raise KeyboardInterrupt

    flat = {path: Tensor.of(value, path) for path, value in flatten(lm.params).items()}
    flat["final_norm/bias"] = flat["final_norm/bias"]._replace(read=killed)
    unreadable = lm.replace(params=unflatten(flat))
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "m", unreadable)
    assert_equal(jaxlm.load(tmp_path / "m"), lm)
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "new", unreadable)
    assert not (tmp_path / "new").exists()
    # Killed between the two renames: the next save finds the previous model where it was put.
    (tmp_path / "m").rename(tmp_path / ".m.replaced")
    (tmp_path / ".m.replaced" / "notes.md").write_text("mine")
    jaxlm.save(lm, tmp_path / "m")
    assert (tmp_path / "m" / "notes.md").exists() and not (tmp_path / ".m.replaced").exists()


def test_params_that_do_not_fit_the_config_are_not_written(tmp_path):
    lm = small()
    flat = flatten(lm.params)
    for change, message in (
        ({"layers_0/mlp/up/kernel": jnp.zeros((16, 25))}, r"'layers_0/mlp/up/kernel' has the shape \(16, 25\)"),
        ({"layers_7/x": jnp.zeros(3)}, "hold 'layers_7/x'"),
        ({"layers_0/mlp/gate": Gate(jnp.ones(24))}, "hold 'layers_0/mlp/gate'.*has no axis names"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxlm.save(lm.replace(params=unflatten({**flat, **change})), tmp_path / "m")
    del flat["final_norm/bias"]
    with pytest.raises(ValueError, match="lack 'final_norm/bias'"):
        jaxlm.save(lm.replace(params=unflatten(flat)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), r"lacks the tensor 'transformer.ln_f.bias', expected .* \[16\]"),
        (rename("transformer.ln_f.bias", "transformer.ln_f.bia"), "'transformer.ln_f.bias'"),
        (lambda t: t.update(surprise=t["transformer.ln_f.bias"]), "unexpected tensor 'surprise'"),
        (
            lambda t: t.update({"transformer.wpe.weight": Tensor.of(np.zeros((9, 16), np.float32), "w")}),
            r"model.safetensors: tensor 'transformer.wpe.weight' has the shape \[9, 16\], expected \[16, 16\]",
        ),
        (lambda t: t.update({"ln_f.bias": t["transformer.ln_f.bias"]}), "'transformer.ln_f.bias' twice"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    jaxlm.save(small(), tmp_path)
    tensors = open_file(tmp_path / SINGLE)
    read = {name: Tensor.of(tensor.read(), name) for name, tensor in tensors.items()}
    change(read)
    write_file(tmp_path / SINGLE, read)
    with pytest.raises(ValueError, match=message) as error:
        jaxlm.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CONFIG, {"model_type": "gpt3"}, "unknown model_type 'gpt3'; did you mean 'gpt2'"),
        (CONFIG, {"architectures": ["GPT2Surprise"]}, "unknown architecture 'GPT2Surprise'"),
        (CONFIG, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (OWN, {"format": 99}, "has the format 99, this version reads 1"),
    ],
)
def test_foreign_configs_are_refused(tmp_path, file, change, message):
    jaxlm.save(small(), tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        jaxlm.load(tmp_path)
    assert str(tmp_path / file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["layers_0/mlp/up/kernel"].update(type="os.system"), "unknown type 'os.system'"),
        (lambda w: w["layers_0/mlp/up/kernel"].pop("scheme"), "Quantized needs 'scheme'"),
        (
            lambda w: w["layers_0/mlp/up/kernel"]["scheme"].update(bits="in8"),
            "'layers_0/mlp/up/kernel': scheme: unknown number format 'in8'; did you mean 'int8'",
        ),
        (lambda w: w["layers_0/mlp/up/kernel"]["scheme"].update(size=8), "its format has no option 'size'"),
        (lambda w: w["layers_0/mlp/up/kernel"].update(bits=4), "Quantized has no field 'bits'"),
        (lambda w: w.pop("layers_0/mlp/up/kernel"), "lacks the tensor 'layers_0/mlp/up/kernel'"),
        (lambda w: w.update({"layers_5/x": w["layers_0/mlp/up/kernel"]}), "lacks the tensor 'layers_5/x.codes'"),
    ],
)
def test_damaged_native_descriptions_are_refused(tmp_path, change, message):
    jaxlm.save(compressed(), tmp_path)
    own = json.loads((tmp_path / OWN).read_text())
    change(own["weights"])
    (tmp_path / OWN).write_text(json.dumps(own))
    with pytest.raises(ValueError, match=message) as error:
        jaxlm.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        jaxlm.load(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        jaxlm.load(tmp_path)
    with pytest.raises(ValueError, match="is a file; a model is a directory"):
        jaxlm.load(tmp_path / CONFIG)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        jaxlm.load(tmp_path / "nowhere")


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    jaxlm.save(small(), tmp_path)
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("read a tensor"))
    open_model(tmp_path)
