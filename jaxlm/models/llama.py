"""Llama, and two families that differ from it in biases and attention windows: Mistral and Qwen2.

Touvron et al. 2023, Jiang et al. 2023, Yang et al. 2024.
"""

import reprlib
import typing
from collections.abc import Mapping
from typing import Any

from jaxlm.core import checked, nearest
from jaxlm.models.config import ModelConfig, check_field
from jaxlm.models.family import Family, Keys, NotExpressible, Row, linear, named, norm, read, refuse, table, write
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
ROPE_KEYS = ("rope_scaling", "rope_parameters")
"""Keys of the scaling in transformers 4 and transformers 5; the latter takes the first of a file with both."""


def read_rotary(hf: Mapping[str, Any]) -> Rotary:
    """Rotary positions of a config of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    Raises:
      ValueError: for positions that are not supported, or keys that do not agree.
    """
    tables = {name: checked(hf.get(name), dict | None, name) or {} for name in ROPE_KEYS}
    theta = _agreed(_values_of(hf, tables, "rope_theta"), 10000.0)
    lengths = _values_of(hf, tables, "original_max_position_embeddings")
    _agreed({key: value for key, value in lengths.items() if value is not None}, None)
    refuse(hf, "rotary embedding", partial_rotary_factor=1.0)
    scalings = {name: _scaling(table, name) for name, table in tables.items() if table.keys() - {"rope_theta"}}
    scaling = _agreed(scalings, {"scaling": "default"})
    return Rotary(theta=checked(theta, float, "rope_theta"), **scaling)


def _values_of(hf: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """`{full key: value}` of a setting in the config itself and in its tables of rotary parameters."""
    values = {key: hf[key]} if key in hf else {}
    return values | {f"{name}.{key}": table[key] for name, table in tables.items() if key in table}


def _scaling(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of Rotary, all but the base, from the table called `name`."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{name}: different positions for the layers of type {key!r} are not supported")
    refuse(table, f"{name}: rotary embedding", partial_rotary_factor=1.0)
    types = {f"{name}.{key}": table[key] for key in ("rope_type", "type") if table.get(key) is not None}
    kind = checked(_agreed(types, "default"), str, f"{name}: the rope type")
    if kind not in SCALINGS:
        raise ValueError(f"{name}: the rope type {kind!r} is not supported; {nearest(kind, SCALINGS)}")
    missing = [key for key in SCALINGS[kind].values() if key not in table]
    if missing:
        raise ValueError(f"{name}: the rope type {kind!r} needs {missing[0]!r}")
    kinds = typing.get_type_hints(Rotary)
    values = {field: checked(table[key], kinds[field], f"{name}.{key}") for field, key in SCALINGS[kind].items()}
    return {"scaling": kind, **values}


def _agreed(settings: Mapping[str, Any], default: Any) -> Any:
    """The value of all these settings, which must be equal; `default` if there are none."""
    values = list(settings.values())
    for key, value in settings.items():
        if value != values[0]:
            first = next(iter(settings))
            shown = f"{first} {reprlib.repr(values[0])} and {key} {reprlib.repr(value)}"
            raise ValueError(f"{shown} do not agree; remove the wrong one")
    return values[0] if values else default


def write_rotary(rotary: Rotary | None) -> dict[str, Any]:
    """The inverse of `read_rotary`, in both forms."""
    if rotary is None:
        return {}  # reading this back gives rotary positions, so `config_to_hf` raises NotExpressible
    scaling = {"rope_type": rotary.scaling}
    scaling |= {key: getattr(rotary, field) for field, key in SCALINGS[rotary.scaling].items()}
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": None if rotary.scaling == "default" else scaling,
        "rope_parameters": {"rope_theta": rotary.theta, **scaling},
    }


def from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = read(hf, LLAMA_KEYS) | {"rotary": read_rotary(hf)}
    _one_type(hf, "full_attention")
    return fields | {"output_bias": fields["qkv_bias"]}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """transformers refuses a Llama whose hidden_size is not a multiple of num_heads, even if head_dim is set."""
    if config.hidden_size % max(config.num_heads[0], 1):
        heads, hidden = config.num_heads[0], config.hidden_size
        raise NotExpressible(f"transformers needs a hidden_size that num_heads divides, not {hidden} and {heads}")
    return write(config, LLAMA_KEYS) | write_rotary(config.rotary)


def mistral_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = read(hf, MISTRAL_KEYS) | {"rotary": read_rotary(hf)}
    _one_type(hf, "full_attention" if fields["window"] is None else "sliding_attention")
    return fields


def mistral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write(config, MISTRAL_KEYS) | write_rotary(config.rotary)


def qwen2_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The window holds from some layer on, which `layer_types` or else `max_window_layers` gives."""
    fields = read(hf, QWEN2_KEYS) | {"rotary": read_rotary(hf)}
    layers = fields["num_layers"]
    first = checked(hf.get("max_window_layers", 28), int, "max_window_layers")
    windowed = checked(hf.get("use_sliding_window", False), bool, "use_sliding_window")
    window = check_field("window", hf.get("sliding_window", 4096), "sliding_window") if windowed else None
    if types := checked(hf.get("layer_types"), tuple[str, ...] | None, "layer_types"):
        first = sum(kind == "full_attention" for kind in types)
        if list(types) != _layer_types(layers, first):
            raise ValueError(
                f"layer_types {reprlib.repr(types)} are not supported (only full_attention, then sliding_attention, "
                f"{layers} in all)"
            )
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


def _one_type(hf: Mapping[str, Any], kind: str) -> None:
    """Raises ValueError for layers of several types, which transformers has in other families only."""
    types = checked(hf.get("layer_types"), tuple[str, ...] | None, "layer_types") or ()
    if set(types) - {kind}:
        raise ValueError(f"layer_types {reprlib.repr(types)} are not supported (only {kind})")


def _layer_types(layers: int, first: int) -> list[str]:
    return ["full_attention"] * first + ["sliding_attention"] * (layers - first)


def body(config: ModelConfig) -> list[Row]:
    hf, layer = "model.layers.{i}", "layers_{i}"
    return [
        table("model.embed_tokens", "embed/tokens"),
        *norm(f"{hf}.input_layernorm", f"{layer}/attention_norm"),
        *linear(f"{hf}.self_attn.q_proj", f"{layer}/attention/query"),
        *linear(f"{hf}.self_attn.k_proj", f"{layer}/attention/key"),
        *linear(f"{hf}.self_attn.v_proj", f"{layer}/attention/value"),
        *linear(f"{hf}.self_attn.o_proj", f"{layer}/attention/output"),
        *norm(f"{hf}.post_attention_layernorm", f"{layer}/mlp_norm"),
        *linear(f"{hf}.mlp.gate_proj", f"{layer}/mlp/gate_proj"),
        *linear(f"{hf}.mlp.up_proj", f"{layer}/mlp/up"),
        *linear(f"{hf}.mlp.down_proj", f"{layer}/mlp/down"),
        *norm("model.norm", "final_norm"),
    ]


def _gated_ffn(fields: Mapping[str, Any]) -> int:
    """`8/3 hidden_size`, rounded to a multiple of 64: as many parameters as an ungated FFN of `4 hidden_size`."""
    return max(64, round(fields["hidden_size"] * 8 / 3 / 64) * 64)


def _family(name: str, classes: str, read_config, write_config, **defaults: Any) -> Family:
    return Family(
        name=name,
        defaults={**BODY, **defaults},
        architectures={
            f"{classes}ForCausalLM": {"head": "causal"},
            f"{classes}ForSequenceClassification": {"head": "sequence"},
            f"{classes}ForTokenClassification": {"head": "token"},
            f"{classes}Model": {"head": "none"},
        },
        base="model",
        from_hf=read_config,
        to_hf=write_config,
        body=body,
        heads={
            "causal": named("lm_head", "head/output"),
            "sequence": named("score", "head/output"),
            "token": named("score", "head/output"),
        },
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        ignored=r".*rotary_emb\.inv_freq",
        derived={"ffn_size": _gated_ffn},
    )


LLAMA = _family("llama", "Llama", from_hf, to_hf)
MISTRAL = _family("mistral", "Mistral", mistral_from_hf, mistral_to_hf)
QWEN2 = _family("qwen2", "Qwen2", qwen2_from_hf, qwen2_to_hf, qkv_bias=True)
