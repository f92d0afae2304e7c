"""T5: encoder and decoder with relative position buckets, no biases, RMS norms. Raffel et al. 2020."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.core import checked, lookup
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import ACTIVATIONS, Family, Keys, NotExpressible, Row, linear, named, norm, read, table, write

KEYS: Keys = {
    "vocab_size": ("vocab_size", 32128),
    "hidden_size": ("d_model", 512),
    "head_dim": ("d_kv", 64),
    "ffn_size": ("d_ff", 2048),
    "num_layers": ("num_layers", 6),
    "num_decoder_layers": ("num_decoder_layers", None),
    "num_heads": ("num_heads", 8),
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_max_distance": ("relative_attention_max_distance", 128),
    "dropout": ("dropout_rate", 0.1),
    "head_dropout": ("classifier_dropout", 0.0),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", True),
    "pad_token_id": ("pad_token_id", 0),
    "decoder_start_token_id": ("decoder_start_token_id", None),
}


def from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`tie_word_embeddings: false` (T5 1.1) implies an output that is not scaled; transformers 5 has a separate key."""
    fields = read(hf, KEYS)
    fields["attention_dropout"] = fields["dropout"]
    if fields["num_decoder_layers"] is None:
        fields["num_decoder_layers"] = fields["num_layers"]
    if fields["decoder_start_token_id"] is None:
        fields["decoder_start_token_id"] = fields["pad_token_id"]
    scaled = hf.get("scale_decoder_outputs", fields["tie_embeddings"])
    fields["scale_head"] = checked(scaled, bool, "scale_decoder_outputs")
    feed_forward = checked(hf.get("feed_forward_proj", "relu"), str, "feed_forward_proj")
    *gated, name = feed_forward.split("-")
    if gated not in ([], ["gated"]):
        raise ValueError(
            f"feed_forward_proj {feed_forward!r} is not supported (only <activation> and gated-<activation>)"
        )
    fields["gated"] = bool(gated)
    fields["activation"] = "gelu_tanh" if gated and name == "gelu" else lookup(ACTIVATIONS, name, "activation")
    return fields


def to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.gated:
        projections = {"gelu_tanh": "gated-gelu", "relu": "gated-relu", "silu": "gated-silu"}
    else:
        projections = {"gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", "gelu": "gelu"}
    if config.activation not in projections:
        raise NotExpressible(f"transformers' T5 has no {'gated ' * config.gated}activation {config.activation!r}")
    return {
        **write(config, KEYS),
        "feed_forward_proj": projections[config.activation],
        "scale_decoder_outputs": config.scale_head,
        "is_encoder_decoder": config.encoder_decoder,
    }


def body(config: ModelConfig) -> list[Row]:
    def attention(hf: str, path: str) -> Iterator[Row]:
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            yield from linear(f"{hf}.{letter}", f"{path}/{name}")

    def stack(side: str, prefix: str) -> Iterator[Row]:
        block, layer = f"{side}.block.{{i}}.layer", f"{prefix}layers_{{i}}"
        yield table(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{prefix}relative_positions")
        yield from norm(f"{block}.0.layer_norm", f"{layer}/attention_norm")
        yield from attention(f"{block}.0.SelfAttention", f"{layer}/attention")
        last = 1
        if side == "decoder":
            yield from norm(f"{block}.1.layer_norm", f"{layer}/cross_attention_norm")
            yield from attention(f"{block}.1.EncDecAttention", f"{layer}/cross_attention")
            last = 2
        yield from norm(f"{block}.{last}.layer_norm", f"{layer}/mlp_norm")
        if config.gated:
            yield from linear(f"{block}.{last}.DenseReluDense.wi_0", f"{layer}/mlp/gate_proj")
        yield from linear(f"{block}.{last}.DenseReluDense.{'wi_1' if config.gated else 'wi'}", f"{layer}/mlp/up")
        yield from linear(f"{block}.{last}.DenseReluDense.wo", f"{layer}/mlp/down")
        yield from norm(f"{side}.final_layer_norm", f"{prefix}final_norm")

    return [
        table("shared", "embed/tokens"),
        *stack("encoder", "encoder/" if config.encoder_decoder else ""),
        *(stack("decoder", "decoder/") if config.encoder_decoder else ()),
    ]


T5 = Family(
    name="t5",
    defaults={
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "relative_buckets": 32,
        "norm": "rms",
        "norm_eps": 1e-6,
        "activation": "relu",
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "scale_scores": False,
        "causal": False,
        "scale_head": True,
        "head": "seq2seq",
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    architectures={
        "T5ForConditionalGeneration": {"head": "seq2seq"},
        "T5EncoderModel": {"head": "none", "num_decoder_layers": 0},
        "T5Model": {"head": "none"},
    },
    base="",
    from_hf=from_hf,
    to_hf=to_hf,
    body=body,
    heads={"seq2seq": named("lm_head", "head/output")},
    aliases={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    derived={"num_decoder_layers": lambda fields: fields["num_layers"]},
    special_tokens={"pad_token_id": "pad_token_id", "decoder_start_token_id": "pad_token_id"},
)
