"""BERT and RoBERTa: encoders with norms after the residual sums. Devlin et al. 2019, Liu et al. 2019."""

from collections.abc import Mapping
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.family import Family, Keys, Row, linear, named, norm, read, refuse, table, write

KEYS: Keys = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "ffn_size": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "type_vocab_size": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "head_dropout": ("classifier_dropout", None),
    "tie_embeddings": ("tie_word_embeddings", True),
    "pad_token_id": ("pad_token_id", 0),
    "init_std": ("initializer_range", 0.02),
}
ROBERTA_KEYS: Keys = {
    **KEYS,
    "vocab_size": ("vocab_size", 50265),
    "pad_token_id": ("pad_token_id", 1),
}
BODY = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "max_positions": 512,
    "norm_eps": 1e-12,
    "pre_norm": False,
    "embed_norm": True,
    "final_norm": False,
    "causal": False,
    "pooling": "first",
    "pooler": True,
    "head": "masked",
}


def from_hf(hf: Mapping[str, Any], keys: Keys = KEYS) -> dict[str, Any]:
    refuse(
        hf,
        str(hf["model_type"]),
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        pruned_heads={},
    )
    fields = read(hf, keys)
    if fields["head_dropout"] is None:
        fields["head_dropout"] = fields["dropout"]
    return fields


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return write(config, KEYS)


def roberta_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """RoBERTa's position table begins with `pad_token_id + 1` rows that no token uses."""
    refuse(hf, "roberta", hidden_act="gelu")  # its head always has gelu
    fields = from_hf(hf, ROBERTA_KEYS)
    if fields["pad_token_id"] is None:
        raise ValueError("roberta needs a pad_token_id in config.json: its positions are counted from there")
    offset = fields["pad_token_id"] + 1
    return fields | {"position_offset": offset, "max_positions": fields["max_positions"] - offset}


def roberta_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write(config, ROBERTA_KEYS) | {"max_position_embeddings": config.max_positions + config.position_offset}


def _body(base: str) -> list[Row]:
    hf, layer = f"{base}.encoder.layer.{{i}}", "layers_{i}"
    return [
        table(f"{base}.embeddings.word_embeddings", "embed/tokens"),
        table(f"{base}.embeddings.position_embeddings", "embed/positions"),
        table(f"{base}.embeddings.token_type_embeddings", "embed/types"),
        *norm(f"{base}.embeddings.LayerNorm", "embed/norm"),
        *linear(f"{hf}.attention.self.query", f"{layer}/attention/query"),
        *linear(f"{hf}.attention.self.key", f"{layer}/attention/key"),
        *linear(f"{hf}.attention.self.value", f"{layer}/attention/value"),
        *linear(f"{hf}.attention.output.dense", f"{layer}/attention/output"),
        *norm(f"{hf}.attention.output.LayerNorm", f"{layer}/attention_norm"),
        *linear(f"{hf}.intermediate.dense", f"{layer}/mlp/up"),
        *linear(f"{hf}.output.dense", f"{layer}/mlp/down"),
        *norm(f"{hf}.output.LayerNorm", f"{layer}/mlp_norm"),
    ]


def _masked_head(config: ModelConfig, hf: str, transform: str, normalization: str) -> list[Row]:
    """transformers stores the bias a second time beside an untied output; that copy is written, and not used."""
    rows = [*linear(f"{hf}.{transform}", "head/transform"), *norm(f"{hf}.{normalization}", "head/norm")]
    if config.tie_embeddings:
        return [*rows, Row(f"{hf}.bias", ("head/output/bias",))]
    return [*rows, *linear(f"{hf}.decoder", "head/output"), Row(f"{hf}.bias", ("head/output/bias",), copy=True)]


def body(config: ModelConfig) -> list[Row]:
    return _body("bert")


def masked(config: ModelConfig) -> list[Row]:
    """Masked language modelling, and where a config has it the prediction of the next sentence."""
    return [
        *linear("bert.pooler.dense", "head/pooler"),
        *_masked_head(config, "cls.predictions", "transform.dense", "transform.LayerNorm"),
        *linear("cls.seq_relationship", "head/next_sentence"),
    ]


def sequence(config: ModelConfig) -> list[Row]:
    return [*linear("bert.pooler.dense", "head/pooler"), *linear("classifier", "head/output")]


def roberta_body(config: ModelConfig) -> list[Row]:
    return _body("roberta")


def roberta_masked(config: ModelConfig) -> list[Row]:
    return _masked_head(config, "lm_head", "dense", "layer_norm")


def roberta_sequence(config: ModelConfig) -> list[Row]:
    """The sequence classifier has its own tanh layer instead of BERT's pooler."""
    return [*linear("classifier.dense", "head/pooler"), *linear("classifier.out_proj", "head/output")]


BERT = Family(
    name="bert",
    defaults={**BODY, "type_vocab_size": 2, "pad_token_id": 0},
    architectures={
        "BertForMaskedLM": {"head": "masked", "next_sentence": False},
        "BertForPreTraining": {"head": "masked", "next_sentence": True},
        "BertForSequenceClassification": {"head": "sequence"},
        "BertForTokenClassification": {"head": "token"},
        "BertModel": {"head": "pooled"},
    },
    base="bert",
    from_hf=from_hf,
    to_hf=to_hf,
    body=body,
    heads={
        "masked": masked,
        "sequence": sequence,
        "token": named("classifier", "head/output"),
        "pooled": named("bert.pooler.dense", "head/pooler"),
    },
    aliases={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)

ROBERTA = Family(
    name="roberta",
    defaults={**BODY, "norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1},
    architectures={
        "RobertaForMaskedLM": {"head": "masked", "next_sentence": False},
        "RobertaForSequenceClassification": {"head": "sequence"},
        "RobertaForTokenClassification": {"head": "token"},
        "RobertaModel": {"head": "pooled"},
    },
    base="roberta",
    from_hf=roberta_from_hf,
    to_hf=roberta_to_hf,
    body=roberta_body,
    heads={
        "masked": roberta_masked,
        "sequence": roberta_sequence,
        "token": named("classifier", "head/output"),
        "pooled": named("roberta.pooler.dense", "head/pooler"),
    },
    aliases={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    derived={"position_offset": lambda fields: fields["pad_token_id"] + 1},
)
