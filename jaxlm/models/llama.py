"""Llama and what differs from it in biases and windows: Mistral, Qwen2.

Touvron et al. 2023, Jiang et al. 2023, Yang et al. 2024.
"""

import reprlib
import typing
from collections.abc import Mapping
from typing import Any

from jaxlm.core import checked, nearest
from jaxlm.models.config import ModelConfig, check_field
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
PLACES = ("rope_scaling", "rope_parameters")
"""Where transformers 4 and transformers 5 keep the scaling; the latter takes the first where a file has both."""


def read_rotary(hf: Mapping[str, Any]) -> Rotary:
    """Rotary positions of a config of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    Raises:
      ValueError: for positions that are not supported, or two places that do not agree.
    """
    places = {place: checked(hf.get(place), dict | None, place) or {} for place in PLACES}
    bases = {"rope_theta": hf} | {f"{place}.rope_theta": given for place, given in places.items()}
    theta = _agreed({where: given["rope_theta"] for where, given in bases.items() if "rope_theta" in given}, 10000.0)
    lengths = {"original_max_position_embeddings": hf}
    lengths |= {f"{place}.original_max_position_embeddings": given for place, given in places.items()}
    key = "original_max_position_embeddings"
    _agreed({where: given[key] for where, given in lengths.items() if given.get(key) is not None}, None)
    refuse(hf, "rotary embedding", partial_rotary_factor=1.0)
    scalings = {place: _scaling(given, place) for place, given in places.items() if given.keys() - {"rope_theta"}}
    scaling = _agreed(scalings, {"scaling": "default"})
    return Rotary(theta=checked(theta, float, "rope_theta"), **scaling)


def _scaling(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Fields of Rotary, all but the base, out of one of the places."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{place}: positions of their own for the layers of type {name!r} are not supported")
    refuse(given, f"{place}: rotary embedding", partial_rotary_factor=1.0)
    types = {f"{place}.{key}": given[key] for key in ("rope_type", "type") if given.get(key) is not None}
    kind = checked(_agreed(types, "default"), str, f"{place}: the rope type")
    if kind not in SCALINGS:
        raise ValueError(f"{place}: the rope type {kind!r} is not supported; {nearest(kind, SCALINGS)}")
    missing = [key for key in SCALINGS[kind].values() if key not in given]
    if missing:
        raise ValueError(f"{place}: the rope type {kind!r} needs {missing[0]!r}")
    kinds = typing.get_type_hints(Rotary)
    values = {field: checked(given[key], kinds[field], f"{place}.{key}") for field, key in SCALINGS[kind].items()}
    return {"scaling": kind, **values}


def _agreed(places: Mapping[str, Any], default: Any) -> Any:
    """The one value that all places have which have any."""
    values = list(places.values())
    for place, value in places.items():
        if value != values[0]:
            first = next(iter(places))
            shown = f"{first} {reprlib.repr(values[0])} and {place} {reprlib.repr(value)}"
            raise ValueError(f"{shown} do not agree; remove the wrong one")
    return values[0] if values else default


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
    _one_type(hf, "full_attention")
    return fields | {"output_bias": fields["qkv_bias"]}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """transformers refuses a Llama whose width its heads do not divide, although they have a width of their own."""
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
    """The window begins at some layer and stays: given by the layers' types, or by `max_window_layers`."""
    fields = read(hf, QWEN2_KEYS) | {"rotary": read_rotary(hf)}
    layers = fields["num_layers"]
    first = checked(hf.get("max_window_layers", 28), int, "max_window_layers")
    slides = checked(hf.get("use_sliding_window", False), bool, "use_sliding_window")
    window = check_field("window", hf.get("sliding_window", 4096), "sliding_window") if slides else None
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
    """Refuses layers of several types: what transformers has for those are families of their own."""
    types = checked(hf.get("layer_types"), tuple[str, ...] | None, "layer_types") or ()
    if set(types) - {kind}:
        raise ValueError(f"layer_types {reprlib.repr(types)} are not supported (only {kind})")


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
