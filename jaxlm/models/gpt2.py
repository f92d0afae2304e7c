"""GPT-2: learned positions, pre-norm, decoder-only. Radford et al. 2019."""

from collections.abc import Mapping
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.family import Family, Keys, Row, named, norm, read, refuse, table, write

KEYS: Keys = {
    "vocab_size": ("vocab_size", 50257),
    "hidden_size": ("n_embd", 768),
    "num_layers": ("n_layer", 12),
    "num_heads": ("n_head", 12),
    "ffn_size": ("n_inner", None),
    "max_positions": ("n_positions", 1024),
    "activation": ("activation_function", "gelu_new"),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "dropout": ("resid_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "head_dropout": ("classifier_dropout", None),
    "scale_scores": ("scale_attn_weights", True),
    "tie_embeddings": ("tie_word_embeddings", True),
    "pad_token_id": ("pad_token_id", None),
    "init_std": ("initializer_range", 0.02),
}


def from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`dropout` is `resid_pdrop`: one rate for the embeddings and the residuals."""
    refuse(hf, "gpt2", scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, pruned_heads={})
    fields = read(hf, KEYS)
    if fields["head_dropout"] is None:
        fields["head_dropout"] = 0.1
    return fields


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return write(config, KEYS) | {"embd_pdrop": config.dropout}


def body(config: ModelConfig) -> list[Row]:
    """GPT-2's Conv1D stores kernels as `[in, out]`, and query, key and value in one tensor."""
    hf, layer = "transformer.h.{i}", "layers_{i}"

    def conv(name: str, *paths: str) -> list[Row]:
        return [
            Row(f"{hf}.{name}.weight", tuple(f"{layer}/{path}/kernel" for path in paths)),
            Row(f"{hf}.{name}.bias", tuple(f"{layer}/{path}/bias" for path in paths)),
        ]

    return [
        table("transformer.wte", "embed/tokens"),
        table("transformer.wpe", "embed/positions"),
        *norm(f"{hf}.ln_1", f"{layer}/attention_norm"),
        *conv("attn.c_attn", "attention/query", "attention/key", "attention/value"),
        *conv("attn.c_proj", "attention/output"),
        *norm(f"{hf}.ln_2", f"{layer}/mlp_norm"),
        *conv("mlp.c_fc", "mlp/up"),
        *conv("mlp.c_proj", "mlp/down"),
        *norm("transformer.ln_f", "final_norm"),
    ]


GPT2 = Family(
    name="gpt2",
    defaults={
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "max_positions": 512,
        "activation": "gelu_tanh",
    },
    architectures={
        "GPT2LMHeadModel": {"head": "causal"},
        "GPT2ForSequenceClassification": {"head": "sequence"},
        "GPT2ForTokenClassification": {"head": "token"},
        "GPT2Model": {"head": "none"},
    },
    base="transformer",
    from_hf=from_hf,
    to_hf=to_hf,
    body=body,
    heads={
        "causal": named("lm_head", "head/output"),
        "sequence": named("score", "head/output"),
        "token": named("classifier", "head/output"),
    },
    aliases={"lm_head.weight": "transformer.wte.weight"},
    ignored=r"(.*\.)?attn\.(bias|masked_bias)",
)
