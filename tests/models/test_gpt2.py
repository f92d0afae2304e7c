import pytest

pytestmark = pytest.mark.torch

SMALL = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind, **settings):
    import transformers

    return getattr(transformers, kind)(transformers.GPT2Config(**{**SMALL, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": False, "n_inner": 48, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False, "n_head": 2, "activation_function": "relu"},
    ],
    ids=["tied", "untied", "unscaled"],
)
def test_causal(parity, settings):
    lm = parity(build("GPT2LMHeadModel", **settings))
    assert lm.config.head == "causal" and lm.config.tie_embeddings == settings.get("tie_word_embeddings", True)


def test_sequence_reads_the_last_real_token(parity):
    labels = {0: "no", 1: "maybe", 2: "yes"}
    lm = parity(build("GPT2ForSequenceClassification", id2label=labels, pad_token_id=0))
    assert lm.config.labels == ("no", "maybe", "yes")


def test_token(parity):
    parity(build("GPT2ForTokenClassification", num_labels=5))


def test_bare(parity):
    parity(build("GPT2Model"), ours="last_hidden", theirs="last_hidden_state")
