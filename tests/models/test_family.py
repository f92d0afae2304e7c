"""Families as data: every config of every head has names for all its parameters, and survives transformers' config."""

import pytest

from jaxlm.io.hf_tensors import rows
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.family import NotExpressible, config_from_hf, config_to_hf
from jaxlm.models.llama import read_rotary
from jaxlm.nn.layer import Rotary

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
CASES = [
    (family, architecture, tie)
    for family in FAMILIES
    for architecture in FAMILIES[family].architectures
    for tie in (True, False)
]


def config_of(family, architecture, **fields):
    implied = dict(FAMILIES[family].architectures[architecture])
    if implied["head"] in ("sequence", "token"):
        implied["labels"] = ("a", "b", "c")
    return model_config(family, **{**SMALL, **implied, **fields})


@pytest.mark.parametrize(("family", "architecture", "tie"), CASES)
def test_names_cover_every_parameter_once_and_config_round_trips(family, architecture, tie):
    config = config_of(family, architecture, tie_embeddings=tie, head_dropout=0.25)
    names = [row.hf for row in rows(config)]
    assert len(set(names)) == len(names)
    hf = config_to_hf(FAMILIES[family], config)
    assert hf["architectures"] == [architecture]
    again = config_from_hf(FAMILIES[family], hf)
    if config.head not in ("causal", "masked", "seq2seq"):
        again = again.replace(tie_embeddings=tie)
    ignored = {"head_dropout": 0.25} if family in ("llama", "mistral", "qwen2") else {}
    assert again.replace(**ignored) == config


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gpt2", {"ffn_size": (64, 32)}, "ffn_size"),
        ("gpt2", {"num_heads": (4, 2), "head_dim": 8}, "num_heads"),
        ("gpt2", {"num_heads": 2, "head_dim": 8}, "head_dim"),
        ("gpt2", {"num_heads": 3, "head_dim": 8}, "hidden_size"),
        ("gpt2", {"num_kv_heads": 2}, "num_kv_heads"),
        ("gpt2", {"rotary": Rotary()}, "rotary"),
        ("bert", {"head": "none"}, "head 'none'"),
        ("bert", {"num_heads": 2, "head_dim": 8}, "head_dim"),
        ("bert", {"pre_norm": True}, "pre_norm"),
        ("roberta", {"activation": "relu"}, "hidden_act"),
        ("llama", {"window": 8}, "window"),
        ("llama", {"rotary": None}, "rotary"),
        ("llama", {"output_bias": True}, "output_bias"),
        ("mistral", {"window": 8, "window_from": 1}, "window_from"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias"),
        ("t5", {"decoder_num_heads": 2}, "decoder_num_heads"),
        ("t5", {"gated": True, "activation": "gelu"}, "activation"),
    ],
)
def test_what_transformers_cannot_say_is_not_expressible(family, fields, reason):
    with pytest.raises(NotExpressible, match=reason):
        config_to_hf(FAMILIES[family], model_config(family, **{**SMALL, **fields}))


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("gpt2", {"activation_function": "quick_gelu"}, "unknown activation 'quick_gelu'"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "unknown architecture 'GPT2DoubleHeadsModel'"),
        ("gpt2", {"architectures": None}, "names no architecture"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "unknown architecture 'BertForQuestionAnswering'"),
        ("roberta", {"pad_token_id": None}, "needs a pad_token_id"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs 'low_freq_factor'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("t5", {"feed_forward_proj": "glu-gelu"}, "feed_forward_proj 'glu-gelu'"),
    ],
)
def test_unsupported_settings_are_refused_by_name(family, setting, message):
    hf = config_to_hf(FAMILIES[family], config_of(family, next(iter(FAMILIES[family].architectures))))
    with pytest.raises(ValueError, match=message):
        config_from_hf(FAMILIES[family], hf | setting)


def test_rotary_of_transformers_4_and_5():
    hf = config_to_hf(FAMILIES["llama"], model_config("llama", **SMALL, rotary=Rotary(500.0, "linear", 4.0)))
    four = {key: value for key, value in hf.items() if key != "rope_parameters"}
    four["rope_scaling"] = {"type": "linear", "factor": 4.0}
    five = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}
    for form in (four, five):
        assert config_from_hf(FAMILIES["llama"], form).rotary == Rotary(500.0, "linear", 4.0)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope", "rotary"),
    [
        ({"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}, "both"),
        ({"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}}, "both"),
        (
            {
                "rope_theta": 500000,
                "rope_scaling": {**LLAMA3, "type": "llama3", "rope_type": "llama3"},
                "rope_parameters": {**LLAMA3, "factor": 8, "rope_type": "llama3", "rope_theta": 500000.0},
            },
            "both",
        ),
        ({"rope_theta": 500000.0, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, "theta"),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 500000.0}}, "theta"),
        ({"rope_theta": 500000.0, "rope_scaling": {"type": "default"}}, "theta"),
        ({}, "neither"),
    ],
)
def test_rotary_positions_that_are_said_once_or_twice_alike(rope, rotary):
    expected = {
        "both": Rotary(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        "theta": Rotary(500000.0),
        "neither": Rotary(10000.0),
    }[rotary]
    assert read_rotary(rope) == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling .*linear.* and rope_parameters .*default.* do not agree",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling: the rope type 'yarn' is not supported",
        ),
        (
            {"rope_parameters": {"rope_theta": 500000.0}, "rope_theta": 10000.0},
            "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 do not agree",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type 'default' and rope_scaling.type 'linear' do not agree",
        ),
        (
            {"original_max_position_embeddings": 4096, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
            "original_max_position_embeddings 4096 and rope_scaling.original_max_position_embeddings 8192",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layers of type 'full_attention'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: expected a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor 0.0 of rotary positions must be above 0"),
        ({"rope_scaling": {**LLAMA3, "type": "llama3", "high_freq_factor": 1.0}}, "must differ"),
        ({"rope_scaling": ["linear"]}, "rope_scaling: expected a table"),
        ({"rope_theta": None}, "rope_theta: expected a finite number"),
        ({"rope_theta": 0}, "theta 0.0 of rotary positions must be above 0"),
    ],
)
def test_rotary_positions_that_disagree_or_cannot_be(rope, message):
    with pytest.raises(ValueError, match=message):
        read_rotary(rope)


def test_t5_1_1_of_transformers_4_is_untied_and_unscaled():
    hf = config_to_hf(FAMILIES["t5"], model_config("t5", **SMALL))
    del hf["scale_decoder_outputs"]
    config = config_from_hf(FAMILIES["t5"], hf | {"tie_word_embeddings": False})
    assert not config.tie_embeddings and not config.scale_head


def test_fresh_configs():
    assert model_config("t5", vocab_size=10, num_layers=3).num_decoder_layers == 3
    assert model_config("roberta", vocab_size=10, pad_token_id=0).position_offset == 1
    assert model_config("llama", vocab_size=10, hidden_size=768).ffn_size == (2048,) * 4


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        model_config("gpt2", hiden_size=32)
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        model_config("lama")
