import pytest

pytestmark = pytest.mark.torch

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def build(kind, **settings):
    import transformers

    family = "Roberta" if kind.startswith("Roberta") else "Bert"
    positions = {"max_position_embeddings": 34 if family == "Roberta" else 32}
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**{**SMALL, **positions, **settings}))


def test_masked(parity):
    assert parity(build("BertForMaskedLM")).config.tie_embeddings


def test_masked_untied(parity):
    lm = parity(build("BertForMaskedLM", tie_word_embeddings=False, hidden_act="gelu_new", type_vocab_size=3))
    assert "kernel" in lm.params["head"]["output"]


def test_next_sentence(parity):
    model = build("BertForPreTraining")
    lm = parity(model, theirs="prediction_logits")
    assert lm.config.next_sentence
    parity(model, ours="next_sentence_logits", theirs="seq_relationship_logits")


def test_sequence(parity):
    assert parity(build("BertForSequenceClassification", num_labels=3)).config.labels == (
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    )


def test_regression(parity):
    lm = parity(build("BertForSequenceClassification", num_labels=1))
    assert lm.config.regression and lm.config.labels == ()


def test_token(parity):
    parity(build("BertForTokenClassification", num_labels=5, layer_norm_eps=1e-3))


def test_bare_with_pooler(parity):
    parity(build("BertModel"), ours="last_hidden", theirs="last_hidden_state")
    parity(build("BertModel"), ours="pooled", theirs="pooler_output")


@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
def test_roberta(parity, kind):
    lm = parity(build(f"Roberta{kind}", type_vocab_size=1))
    assert (lm.config.position_offset, lm.config.max_positions) == (2, 32)


def test_roberta_bare(parity):
    parity(build("RobertaModel"), ours="pooled", theirs="pooler_output")
