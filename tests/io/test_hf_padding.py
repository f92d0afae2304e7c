"""Pruned models in sizes that transformers can express: it loads them, and its logits are the small model's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Gate, flatten, map_leaves, unflatten
from jaxlm.io.model_directory import PADDED
from jaxlm.methods.prune.structured.gates import open_gates, prune
from jaxlm.methods.prune.structured.shrink import shrink
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.models import model_config
from jaxlm.runner import registry

pytestmark = pytest.mark.slow

PRUNED = {
    "bert": {"heads": (0.5, 0.25), "ffn": (0.5, 0.25)},
    "bert, narrow": {"heads": 0.5, "hidden": 0.25},
    "bert, wide heads": {"heads": 0.5, "hidden": 0.125},
    "gpt2": {"heads": (0.5, 0.75), "ffn": 0.5},
    "llama": {"heads": (0.5, 0.0), "ffn": (0.5, 0.25), "hidden": 0.3},
    "llama, 3 heads": {"heads": 0.25},
    "t5": {"heads": 0.5, "ffn": (0.0, 0.5, 0.25, 0.5), "hidden": 0.25},
}


def theirs(name):
    """A model of transformers, and the class's body is random."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    small = {"vocab_size": 23, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    small |= {"hidden_size": 32, "max_position_embeddings": 16}
    if name == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**small, num_labels=3))
    if name == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=23, n_embd=32, n_head=4, n_layer=2, n_inner=24, n_positions=16)
        )
    if name == "llama":
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(**small | {"num_attention_heads": 8}, num_key_value_heads=4, head_dim=8)
        )
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=23, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def batch_of(config):
    rng = np.random.default_rng(0)
    batch = {"input_ids": rng.integers(3, 23, (2, 7)), "attention_mask": np.array([[1] * 7, [1] * 5 + [0] * 2])}
    return batch | ({"decoder_input_ids": rng.integers(3, 23, (2, 5))} if config.encoder_decoder else {})


def real(config, values, batch):
    """Logits at tokens (or rows) that are real."""
    tokens = config.head == "causal"
    return np.asarray(values)[batch["attention_mask"] > 0] if tokens else np.asarray(values)


@pytest.mark.full("t5", "bert, narrow", "bert, wide heads")
@pytest.mark.torch
@pytest.mark.parametrize("name", PRUNED)
def test_transformers_loads_the_padded_model(name, tmp_path):
    import torch
    import transformers as tf

    family = name.split(",")[0]
    model = theirs(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "theirs")
    lm = jaxlm.load(tmp_path / "theirs")
    small = prune(lm, **PRUNED[name])
    reason = jaxlm.save(small, tmp_path / "small", padded=True)
    assert reason is not None, "transformers cannot hold these sizes"

    batch = batch_of(small.config)
    expected = real(small.config, small.apply(small.params, batch)["logits"], batch)
    loaded, info = type(model).from_pretrained(tmp_path / "small" / PADDED, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = loaded.eval()(**{n: torch.tensor(v) for n, v in batch.items()}).logits.numpy()
    assert np.abs(expected).max() > 0.1 and np.abs(real(small.config, logits, batch) - expected).max() <= 1e-4
    assert isinstance(loaded, tf.PreTrainedModel)

    back = jaxlm.load(tmp_path / "small" / PADDED)
    assert np.abs(real(small.config, back.apply(back.params, batch)["logits"], batch) - expected).max() <= 1e-5
    again = jaxlm.load(tmp_path / "small")
    assert again.config == small.config
    assert all(np.array_equal(a, flatten(small.params)[path]) for path, a in flatten(again.params).items())


EXPRESSIBLE = {
    "bert": ({"name": "prune", "ffn": 0.5}, {"name": "keep_layers", "keep": (1,)}),
    "gpt2": ({"name": "prune", "ffn": 0.25}, {"name": "magnitude", "sparsity": 0.5}, {"name": "bake"}),
    "llama": ({"name": "prune", "heads": 0.5, "ffn": 0.5, "hidden": 0.25},),
    "t5": ({"name": "prune", "ffn": 0.5},),
}
"""Surgery after which transformers can hold a model of a family."""


@pytest.mark.torch
@pytest.mark.parametrize("family", EXPRESSIBLE)
def test_transformers_loads_what_it_can_express(family, tmp_path):
    import torch

    model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    lm = jaxlm.load(tmp_path / "theirs")
    for entry in EXPRESSIBLE[family]:
        lm = registry.operate(entry, lm)
    assert jaxlm.save(lm, tmp_path / "small") is None
    batch = batch_of(lm.config)
    expected = real(lm.config, lm.network.forward(lm.params, batch)["logits"], batch)
    loaded, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = loaded.eval()(**{n: torch.tensor(v) for n, v in batch.items()}).logits.numpy()
    assert np.abs(real(lm.config, logits, batch) - expected).max() <= 1e-4


def tiny(family, **fields):
    """A model in memory, without torch; its biases and norms are random too."""
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_heads": 4, "num_layers": 2, "ffn_size": 12}
    lm = jaxlm.LM.initialize(model_config(family, **sizes, **fields), jax.random.key(0))

    def noisy(path, array):
        return array + 0.1 * jax.random.normal(jax.random.key(len(path)), array.shape)

    return lm.replace(params=map_leaves(noisy, lm.params))


def test_t5_heads_stand_where_their_bias_is(tmp_path):
    """Layers that keep different heads share one table of relative positions."""
    gated = open_gates(tiny("t5"), ("heads",))
    flat = dict(flatten(gated.params))
    for i, heads in enumerate(((1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0))):
        for stack in ("encoder", "decoder"):
            flat[f"{stack}/layers_{i}/attention/gate"] = Gate(jnp.array(heads).reshape(4, 1, 1))
    small = shrink(gated.replace(params=unflatten(flat)))
    jaxlm.save(small, tmp_path / "m", padded=True)
    padded, batch = jaxlm.load(tmp_path / "m" / PADDED), batch_of(small.config)
    logits, expected = (np.asarray(lm.apply(lm.params, batch)["logits"]) for lm in (padded, small))
    assert np.abs(logits - expected).max() <= 1e-5


def test_saving_again_without_it_removes_the_padded_model(tmp_path):
    small = prune(tiny("bert", max_positions=16), heads=0.25)
    jaxlm.save(small, tmp_path / "m", padded=True)
    assert json.loads((tmp_path / "m" / PADDED / "config.json").read_text())["model_type"] == "bert"
    jaxlm.save(small, tmp_path / "m")
    assert not (tmp_path / "m" / PADDED).exists()


def test_what_transformers_can_hold_needs_no_padding(tmp_path):
    assert jaxlm.save(tiny("bert", max_positions=16), tmp_path / "m", padded=True) is None
    assert not (tmp_path / "m" / PADDED).exists()


def test_what_no_padding_can_help_is_said(tmp_path):
    lm = tiny("bert", max_positions=16)
    narrow = prune(lm, hidden=0.2)  # 13 dimensions, 4 heads of 4
    with pytest.raises(ValueError, match="hidden_size 13 divided by the number of heads, and no number from 4 on"):
        jaxlm.save(narrow, tmp_path / "m", padded=True)
    assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match=r"transformers has no Quantized .*bake the model first"):
        jaxlm.save(quantize(lm), tmp_path / "m", padded=True)
