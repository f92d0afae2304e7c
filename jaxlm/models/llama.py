"""Llama and what differs from it in biases and windows: Mistral, Qwen2.

Touvron et al. 2023, Jiang et al. 2023, Yang et al. 2024.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.core import nearest
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import Family, Keys, NotExpressible, Row, linear, norm, read, refuse, table, write
from jaxlm.nn.layer import Rotary

KEYS: Keys = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "ffn_size": ("intermediate_size", 11008),
    "activation": ("hidden_act", "silu"),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
    "tie_embeddings": ("tie_word_embeddings", False),
    "pad_token_id": ("pad_token_id", None),
    "init_std": ("initializer_range", 0.02),
}
LLAMA_KEYS: Keys = {**KEYS, "qkv_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)}
MISTRAL_KEYS: Keys = {
    **KEYS,
    "num_kv_heads": ("num_key_value_heads", 8),
    "ffn_size": ("intermediate_size", 14336),
    "window": ("sliding_window", 4096),
}
QWEN2_KEYS: Keys = {
    **KEYS,
    "vocab_size": ("vocab_size", 151936),
    "num_kv_heads": ("num_key_value_heads", 32),
    "ffn_size": ("intermediate_size", 22016),
}
BODY = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "rotary": Rotary(),
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "silu",
    "gated": True,
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}
SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
}
"""Scaling of rotary frequencies -> field of Rotary -> key in transformers."""


def read_rotary(hf: Mapping[str, Any]) -> Rotary:
    """Rotary positions of a config of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(f"the rope type {kind!r} is not supported; {nearest(str(kind), SCALINGS)}")
    for place in (hf, given):
        refuse(place, "rotary embedding", partial_rotary_factor=1.0)
    missing = [key for key in SCALINGS[kind].values() if key not in given]
    if missing:
        raise ValueError(f"the rope type {kind!r} needs {missing[0]!r}")
    theta = given.get("rope_theta", hf.get("rope_theta", 10000.0))
    return Rotary(float(theta), kind, **{field: given[key] for field, key in SCALINGS[kind].items()})


def write_rotary(rotary: Rotary | None) -> dict[str, Any]:
    """The inverse of `read_rotary`, in both forms."""
    if rotary is None:
        return {}  # reading this back gives rotary positions, so the caller finds that it is not expressible
    scaling = {"rope_type": rotary.scaling}
    scaling |= {key: getattr(rotary, field) for field, key in SCALINGS[rotary.scaling].items()}
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": None if rotary.scaling == "default" else scaling,
        "rope_parameters": {"rope_theta": rotary.theta, **scaling},
    }


def from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = read(hf, LLAMA_KEYS) | {"rotary": read_rotary(hf)}
    return fields | {"output_bias": fields["qkv_bias"]}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """transformers refuses a Llama whose width its heads do not divide, although they have a width of their own."""
    if config.hidden_size % max(config.num_heads[0], 1):
        heads, hidden = config.num_heads[0], config.hidden_size
        raise NotExpressible(f"transformers needs a hidden_size that num_heads divides, not {hidden} and {heads}")
    return write(config, LLAMA_KEYS) | write_rotary(config.rotary)


def mistral_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    return read(hf, MISTRAL_KEYS) | {"rotary": read_rotary(hf)}


def mistral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write(config, MISTRAL_KEYS) | write_rotary(config.rotary)


def qwen2_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The window begins at some layer and stays: given by the layers' types, or by `max_window_layers`."""
    fields = read(hf, QWEN2_KEYS) | {"rotary": read_rotary(hf)}
    layers = fields["num_layers"]
    first = hf.get("max_window_layers", 28)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    if types := hf.get("layer_types"):
        first = sum(kind == "full_attention" for kind in types)
        if types != _layer_types(layers, first):
            raise ValueError(f"layer_types {types} are not supported (only full_attention, then sliding_attention)")
    if window is None or first >= layers:
        return fields
    return fields | {"window": window, "window_from": first}


def qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    first = config.num_layers if config.window is None else config.window_from
    return {
        **write(config, QWEN2_KEYS),
        **write_rotary(config.rotary),
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": first,
        "layer_types": _layer_types(config.num_layers, first),
    }


def _layer_types(layers: int, first: int) -> list[str]:
    return ["full_attention"] * first + ["sliding_attention"] * (layers - first)


def names(config: ModelConfig) -> list[Row]:
    hf, own = "model.layers.{i}", "layers_{i}"
    return [
        table("model.embed_tokens", "embed/tokens"),
        *norm(f"{hf}.input_layernorm", f"{own}/attention_norm"),
        *linear(f"{hf}.self_attn.q_proj", f"{own}/attention/query"),
        *linear(f"{hf}.self_attn.k_proj", f"{own}/attention/key"),
        *linear(f"{hf}.self_attn.v_proj", f"{own}/attention/value"),
        *linear(f"{hf}.self_attn.o_proj", f"{own}/attention/output"),
        *norm(f"{hf}.post_attention_layernorm", f"{own}/mlp_norm"),
        *linear(f"{hf}.mlp.gate_proj", f"{own}/mlp/gate_proj"),
        *linear(f"{hf}.mlp.up_proj", f"{own}/mlp/up"),
        *linear(f"{hf}.mlp.down_proj", f"{own}/mlp/down"),
        *norm("model.norm", "final_norm"),
        *linear("score" if config.head in ("sequence", "token") else "lm_head", "head/output"),
    ]


def _gated_ffn(fields: Mapping[str, Any]) -> int:
    """Two thirds of four times the width, in multiples of 64: as many parameters as a plain FFN of four times."""
    return max(64, round(fields["hidden_size"] * 8 / 3 / 64) * 64)


def _family(name: str, classes: str, read_config, write_config, **own: Any) -> Family:
    return Family(
        name=name,
        defaults={**BODY, **own},
        architectures={
            f"{classes}ForCausalLM": {"head": "causal"},
            f"{classes}ForSequenceClassification": {"head": "sequence"},
            f"{classes}ForTokenClassification": {"head": "token"},
            f"{classes}Model": {"head": "none"},
        },
        base="model",
        from_hf=read_config,
        to_hf=write_config,
        names=names,
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        ignored=r".*rotary_emb\.inv_freq",
        derived={"ffn_size": _gated_ffn},
    )


LLAMA = _family("llama", "Llama", from_hf, to_hf)
MISTRAL = _family("mistral", "Mistral", mistral_from_hf, mistral_to_hf)
QWEN2 = _family("qwen2", "Qwen2", qwen2_from_hf, qwen2_to_hf, qkv_bias=True)
