"""A ModelConfig holds what its fields say, whoever wrote the values."""

import numpy as np
import pytest

from jaxlm.core import call
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.config import ModelConfig
from jaxlm.nn.layer import Rotary


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_plain_values(family):
    config = model_config(family, vocab_size=9, num_layers=2, num_heads=(4, 2), head_dim=64, ffn_size=(0, 8))
    assert call(ModelConfig, config.to_json(), "config") == config


def test_sizes_of_nothing_are_sizes():
    config = model_config("gpt2", vocab_size=9, num_layers=2, num_heads=0, head_dim=64, ffn_size=0)
    assert config.num_heads == config.num_kv_heads == config.ffn_size == (0, 0)
    assert call(ModelConfig, config.to_json(), "config") == config
    t5 = model_config("t5", vocab_size=9, num_layers=1, decoder_num_heads=0, decoder_ffn_size=0)
    assert (t5.decoder_num_heads, t5.cross_num_heads, t5.decoder_ffn_size) == ((0,), (4,), (0,))


def test_numbers_of_numpy_become_pythons():
    config = model_config("gpt2", hidden_size=np.int64(8), num_heads=[np.int32(2)] * 4, dropout=np.float32(0.5))
    assert config == model_config("gpt2", hidden_size=8, num_heads=2, dropout=0.5)
    assert {type(size) for size in (config.hidden_size, *config.num_heads)} == {int} and type(config.dropout) is float


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": "x"}, "num_heads: expected a whole number or a list, each entry a whole number, found 'x'"),
        ({"num_heads": (2, 2.0)}, "num_heads: expected a whole number"),
        ({"num_heads": True}, "num_heads: expected a whole number"),
        ({"num_heads": (2, 2)}, "num_heads lists 2 sizes for 4 layers"),
        ({"num_heads": 0}, "hidden_size 256 is not a multiple of num_heads 0"),
        ({"num_heads": -2}, "num_heads -2 must be from 0"),
        ({"num_kv_heads": 0}, "num_heads 4 is not a multiple of num_kv_heads 0"),
        ({"num_layers": 0}, "num_layers 0 must be from 1"),
        ({"num_layers": 10**9}, "num_layers 1000000000 must be from 1 to 1000"),
        ({"ffn_size": 10**40}, "ffn_size .* must be from 0"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number"),
        ({"init_std": float("inf")}, "init_std: expected a finite number"),
        ({"dropout": "0.1"}, "dropout: expected a finite number, found '0.1'"),
        ({"dropout": -0.1}, r"dropout -0.1 must be in \[0, 1\)"),
        ({"causal": 1}, "causal: expected true or false, found 1"),
        ({"norm": "batch"}, "unknown norm 'batch'; known: layer, rms"),
        ({"activation": "gelu_tan"}, "unknown activation 'gelu_tan'; did you mean 'gelu_tanh'"),
        ({"head": "casual"}, "unknown head 'casual'; did you mean 'causal'"),
        ({"pooling": None}, "pooling: expected a text, found None"),
        ({"head": "sequence", "labels": ("a", "b", "a")}, "labels: 2 classes have the name 'a'"),
        ({"head": "sequence", "labels": ("a", 1)}, "labels: expected a list, each entry a text"),
        ({"head": "sequence", "labels": "ab"}, "labels: expected a list, each entry a text, found 'ab'"),
        ({"head": "sequence", "labels": ("a",), "regression": True}, "regression predicts one number, .*'a'"),
        ({"rotary": {"theta": 1.0, "scale": 2}}, "rotary has no option 'scale'; did you mean 'scaling'"),
        ({"rotary": {"scaling": "yarn"}}, "unknown scaling 'yarn'"),
        ({"rotary": Rotary(), "head_dim": 5}, "head_dim must be even, not 5"),
        ({"relative_buckets": 2}, "relative_buckets 2 must be 0 or at least 4"),
        ({"window": 0}, "window 0 must be from 1"),
        ({"position_heads": ((0, 1), (0,), (), (2,))}, "position_heads needs a column for each head of each layer"),
        ({"layer_map": (0, "0", 1, 1)}, "layer_map: expected a list"),
    ],
)
def test_what_a_field_cannot_hold_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        model_config("gpt2", vocab_size=9, **fields)
