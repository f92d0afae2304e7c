import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Tap, flatten
from jaxlm.io.model_directory import CONFIG, OWN
from jaxlm.io.safetensors import SINGLE, Tensor, open_file, write_file
from jaxlm.models import model_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def small(family="bert", **fields):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    config = model_config(family, **{**sizes, **fields})
    return jaxlm.LM.initialize(config, jax.random.key(1))


def edit(directory, change):
    """Rewrites the tensors as another program would have left them, without our file."""
    tensors = {name: Tensor.of(tensor.read(), name) for name, tensor in open_file(directory / SINGLE).items()}
    write_file(directory / SINGLE, change(tensors))
    (directory / OWN).unlink()


def same(a, b, prefix=""):
    a, b = flatten(a.params), flatten(b.params)
    return all(np.array_equal(a[path], b[path]) for path in a if path.startswith(prefix))


# Another head -------------------------------------------------------------------------------------------------------


def test_token_head_on_an_encoder(tmp_path):
    encoder = small(head="pooled")
    jaxlm.save(encoder, tmp_path)
    lm = jaxlm.load(tmp_path, head="token", labels=["O", "B-X", "I-X"], key=jax.random.key(7))
    assert set(lm.fresh) == {"head/output/kernel", "head/output/bias"}
    assert set(lm.dropped) == {"head/pooler/kernel", "head/pooler/bias"}
    assert lm.config.labels == ("O", "B-X", "I-X") and lm.params["head"]["output"]["kernel"].shape == (16, 3)
    assert same(lm, encoder, "layers_")
    again = jaxlm.load(tmp_path, head="token", labels=["O", "B-X", "I-X"], key=jax.random.key(7))
    other = jaxlm.load(tmp_path, head="token", labels=["O", "B-X", "I-X"], key=jax.random.key(8))
    assert same(lm, again) and not same(lm, other)


def test_sequence_head_takes_the_pooler(tmp_path):
    encoder = small(head="masked", next_sentence=True)
    jaxlm.save(encoder, tmp_path)
    lm = jaxlm.load(tmp_path, head="sequence", labels=["a", "b"])
    assert set(lm.fresh) == {"head/output/kernel", "head/output/bias"}
    assert same(lm, encoder.replace(params={"head": {"pooler": encoder.params["head"]["pooler"]}}), "head/pooler")
    regression = jaxlm.load(tmp_path, head="sequence", regression=True)
    assert regression.config.num_labels == 1


def test_robertas_pooler_is_not_its_classifiers(tmp_path):
    jaxlm.save(small("roberta", head="pooled"), tmp_path)
    lm = jaxlm.load(tmp_path, head="sequence", labels=["a", "b"])
    assert "head/pooler/kernel" in lm.fresh and "head/pooler/kernel" in lm.dropped


def test_a_classifier_keeps_its_output_only_for_its_own_labels(tmp_path):
    trained = small(head="token", labels=("O", "B"))
    jaxlm.save(trained, tmp_path)
    assert jaxlm.load(tmp_path, head="token").fresh == ()
    assert jaxlm.load(tmp_path, head="token", labels=["O", "B"]).fresh == ()
    for labels in (["B", "O"], ["O", "B", "I"]):
        lm = jaxlm.load(tmp_path, head="token", labels=labels)
        assert set(lm.fresh) == {"head/output/kernel", "head/output/bias"} == set(lm.dropped)


def test_body_of_an_unknown_architecture(tmp_path):
    jaxlm.save(small(head="pooled"), tmp_path)
    edit(tmp_path, lambda t: {f"bert.{n}": v for n, v in t.items()} | {"qa_outputs.bias": t["pooler.dense.bias"]})
    hf = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(hf | {"architectures": ["BertForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="unknown architecture 'BertForQuestionAnswering'"):
        jaxlm.load(tmp_path)
    lm = jaxlm.load(tmp_path, head="token", labels=["O", "B"])
    assert {"qa_outputs.bias", "bert.pooler.dense.weight"} <= set(lm.dropped)
    edit_again = {**{n: Tensor.of(t.read(), n) for n, t in open_file(tmp_path / SINGLE).items()}}
    edit_again["bert.encoder.layer.9.output.dense.bias"] = edit_again["qa_outputs.bias"]
    write_file(tmp_path / SINGLE, edit_again)
    with pytest.raises(ValueError, match=r"unexpected tensor 'bert.encoder.layer.9.output.dense.bias'"):
        jaxlm.load(tmp_path, head="token", labels=["O", "B"])


def test_missing_outside_the_head_is_an_error_with_another_head_too(tmp_path):
    jaxlm.save(small(head="pooled"), tmp_path)
    edit(tmp_path, lambda t: {n: v for n, v in t.items() if n != "encoder.layer.1.output.dense.bias"})
    with pytest.raises(ValueError, match=r"lacks the tensor 'bert.encoder.layer.1.output.dense.bias'"):
        jaxlm.load(tmp_path, head="token", labels=["O", "B"])


def test_another_head_of_a_native_model(tmp_path):
    jaxlm.save(small("gpt2"), tmp_path, native=True)
    lm = jaxlm.load(tmp_path, head="sequence", labels=["a", "b"], dtype=jnp.bfloat16)
    assert lm.fresh == ("head/output/kernel",)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(lm.params)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "tokens"}, "unknown head of bert 'tokens'; did you mean 'token'"),
        ({"head": "seq2seq"}, "unknown head of bert 'seq2seq'"),
        ({"head": "token"}, r"a token head needs labels=\[...\]"),
        ({"labels": ["a"]}, "labels and regression are for a sequence or token head"),
    ],
)
def test_impossible_heads(tmp_path, options, message):
    jaxlm.save(small(), tmp_path)
    with pytest.raises(ValueError, match=message):
        jaxlm.load(tmp_path, **options)


# What other programs leave ------------------------------------------------------------------------------------------


def test_encoder_without_pooler_has_no_head(tmp_path):
    jaxlm.save(small(head="pooled"), tmp_path)
    edit(tmp_path, lambda t: {n: v for n, v in t.items() if "pooler" not in n})
    lm = jaxlm.load(tmp_path)
    assert lm.config.head == "none" and "head" not in lm.params


def test_old_names_prefixes_and_buffers(tmp_path):
    lm = small(head="pooled")
    jaxlm.save(lm, tmp_path)

    def old(tensors):
        names = {
            n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for n in tensors
        }
        ids = Tensor.of(np.arange(512)[None], "ids")
        return {f"bert.{names[n]}": v for n, v in tensors.items()} | {"bert.embeddings.position_ids": ids}

    edit(tmp_path, old)
    assert same(jaxlm.load(tmp_path), lm)


def test_gpt2_without_prefix_with_masks_and_a_second_copy_of_the_table(tmp_path):
    lm = small("gpt2")
    jaxlm.save(lm, tmp_path)

    def old(tensors):
        mask = Tensor.of(np.ones((1, 1, 4, 4), np.bool_), "mask")
        extra = {
            "h.0.attn.bias": mask,
            "h.1.attn.masked_bias": mask,
            "lm_head.weight": tensors["transformer.wte.weight"],
        }
        return {n.removeprefix("transformer."): v for n, v in tensors.items()} | extra

    edit(tmp_path, old)
    again = jaxlm.load(tmp_path)
    assert same(again, lm) and again.config == lm.config


def test_only_the_second_copy_of_the_table(tmp_path):
    lm = small("gpt2")
    jaxlm.save(lm, tmp_path)
    edit(tmp_path, lambda t: {"lm_head.weight" if n == "transformer.wte.weight" else n: v for n, v in t.items()})
    assert same(jaxlm.load(tmp_path), lm)


def test_a_head_that_differs_from_the_table_is_untied(tmp_path):
    lm = small("gpt2")
    jaxlm.save(lm, tmp_path)
    other = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    edit(tmp_path, lambda t: {**t, "lm_head.weight": Tensor.of(other, "lm_head")})
    again = jaxlm.load(tmp_path)
    assert not again.config.tie_embeddings
    assert np.array_equal(again.params["head"]["output"]["kernel"], other.T)


# In memory ----------------------------------------------------------------------------------------------------------


def test_apply_is_pure_and_takes_numpy_and_taps(tmp_path):
    lm = small("gpt2")
    batch = {"input_ids": np.arange(8).reshape(2, 4), "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]])}
    outputs = lm.apply(lm.params, batch, taps=[Tap("hidden", 1), Tap("attention", 0)])
    assert outputs["logits"].shape == (2, 4, 40) and outputs["logits"].dtype == jnp.float32
    assert outputs["taps"][Tap("hidden", 1)].shape == (2, 4, 16)
    assert outputs["taps"][Tap("attention", 0)].shape == (2, 2, 4, 4)
    np.testing.assert_allclose(jax.jit(lm.apply)(lm.params, batch)["logits"], outputs["logits"], atol=1e-5)


def test_generate_needs_a_head_that_generates_and_a_key_to_sample():
    with pytest.raises(ValueError, match="'masked' does not generate"):
        small().generate({"input_ids": np.zeros((1, 2))}, new_tokens=1)
    with pytest.raises(ValueError, match="sampling needs a key"):
        small("gpt2").generate({"input_ids": np.zeros((1, 2))}, new_tokens=1, temperature=1.0)


def test_dtype(tmp_path):
    lm = small()
    jaxlm.save(lm, tmp_path, dtype=jnp.bfloat16)
    half = jaxlm.load(tmp_path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert json.loads((tmp_path / CONFIG).read_text())["dtype"] == "bfloat16"
    full = jaxlm.load(tmp_path, dtype=jnp.float32)
    for a, b in zip(jax.tree.leaves(lm.params), jax.tree.leaves(full.params), strict=True):
        assert np.array_equal(a.astype(jnp.bfloat16).astype(jnp.float32), b)


def fast_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("native", [False, True])
def test_tokenizer_is_carried_along(tmp_path, native):
    lm = small("gpt2")
    assert lm.tokenizer is None
    jaxlm.save(lm, tmp_path / "none")
    assert jaxlm.load(tmp_path / "none").tokenizer is None
    jaxlm.save(lm.replace(tokenizer_source=fast_tokenizer()), tmp_path / "first", native=native)
    first = jaxlm.load(tmp_path / "first")
    assert first.tokenizer("a b c")["input_ids"] == [2, 3, 1]
    config = tmp_path / "first" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values.pop("tokenizer_class")
    if not native:
        config.write_text(json.dumps(values))  # as old hub repositories have it
    jaxlm.save(first, tmp_path / "second", native=True)
    assert jaxlm.load(tmp_path / "second").tokenizer("b a")["input_ids"] == [3, 2]
    jaxlm.save(lm, tmp_path / "second")
    assert jaxlm.load(tmp_path / "second").tokenizer is None


def test_token_ids_of_the_config_are_carried_along(tmp_path):
    jaxlm.save(small("llama"), tmp_path / "a")
    hf = json.loads((tmp_path / "a" / CONFIG).read_text())
    extra = {"eos_token_id": [7, 8], "bos_token_id": 6, "max_position_embeddings": 77, "surprise": 1}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(hf | extra))
    jaxlm.save(jaxlm.load(tmp_path / "a"), tmp_path / "b")
    written = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert {key: written.get(key) for key in extra} == {**extra, "surprise": None}


# The hub and the command line ---------------------------------------------------------------------------------------


def test_hub_fetches_no_pickles_and_says_when_it_cannot(tmp_path, monkeypatch):
    import huggingface_hub

    jaxlm.save(small(), tmp_path)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert jaxlm.load("someone/model").config.family == "bert"
    assert asked["name"] == "someone/model"
    assert not any(pattern.endswith(("*", "bin", "pt", "pkl")) for pattern in asked["allow_patterns"])

    def offline(name, **options):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="someone/model is no directory here, and the Hugging Face hub did not"):
        jaxlm.load("someone/model")


def convert(*arguments):
    command = [sys.executable, str(ROOT / "experiments" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert(tmp_path):
    lm = small("gpt2")
    jaxlm.save(lm, tmp_path / "a")
    done = convert(f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--dtype=bfloat16", "--native")
    assert done.returncode == 0 and "jaxlm's own layout (asked for)" in done.stdout, done.stderr
    again = jaxlm.load(tmp_path / "b")
    assert again.config == lm.config and again.params["final_norm"]["scale"].dtype == jnp.bfloat16
    (tmp_path / "a" / SINGLE).unlink()
    failed = convert(f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'c'}")
    assert failed.returncode == 1 and "neither model.safetensors" in failed.stderr and "Traceback" not in failed.stderr
    assert "--max-shard-bytes" in convert("--help").stdout


def test_importing_jaxlm_is_quick():
    heavy = "[m for m in ('jax', 'transformers', 'numpy') if m in sys.modules]"
    done = subprocess.run([sys.executable, "-c", f"import sys, jaxlm; print({heavy})"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
