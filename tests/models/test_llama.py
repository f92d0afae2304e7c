import pytest

pytestmark = pytest.mark.torch

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind, **settings):
    import transformers

    config = next(name for name in ("Llama", "Mistral", "Qwen2") if kind.startswith(name)) + "Config"
    return getattr(transformers, kind)(getattr(transformers, config)(**{**SMALL, **settings}))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_grouped_queries(parity, kv_heads, tie):
    lm = parity(build("LlamaForCausalLM", num_key_value_heads=kv_heads, tie_word_embeddings=tie), seed=kv_heads)
    assert lm.config.num_kv_heads == (kv_heads, kv_heads) and lm.config.tie_embeddings == tie


def test_biases_and_head_dim(parity):
    parity(build("LlamaForCausalLM", attention_bias=True, mlp_bias=True, head_dim=12, rms_norm_eps=1e-3))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_scaling(parity, rope):
    assert parity(build("LlamaForCausalLM", rope_parameters=rope)).config.rotary.theta == rope["rope_theta"]


def test_heads(parity):
    parity(build("LlamaForSequenceClassification", num_labels=3, pad_token_id=0))


def test_token_head(parity):
    parity(build("LlamaForTokenClassification", num_labels=3))


@pytest.mark.parametrize("window", [None, 4])
def test_mistral(parity, window):
    lm = parity(build("MistralForCausalLM", num_key_value_heads=2, sliding_window=window))
    assert lm.config.window == window


@pytest.mark.parametrize("windowed", [False, True])
def test_qwen2(parity, windowed):
    settings = {"num_key_value_heads": 2, "use_sliding_window": windowed, "sliding_window": 3, "max_window_layers": 1}
    lm = parity(build("Qwen2ForCausalLM", **settings))
    assert (lm.config.qkv_bias, lm.config.output_bias) == (True, False)
    assert (lm.config.window, lm.config.window_from) == ((3, 1) if windowed else (None, 0))


def test_bare(parity):
    parity(build("MistralModel", num_key_value_heads=2), ours="last_hidden", theirs="last_hidden_state")
