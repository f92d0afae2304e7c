"""Model directories of every family, in which tests of odd and damaged files change one, and how loading fails."""

import json
import time

import numpy as np
import pytest

import jaxlm
from jaxlm.core import Gate, Masked, Quantized, Scheme, flatten, unflatten
from jaxlm.io.model_directory import OWN
from jaxlm.io.safetensors import read_json
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.structured.hard_concrete import HardConcrete
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.network import Network


def small(family, **fields):
    """A model of zeros; nothing is compiled."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "ffn_size": 8}
    if family in ("gpt2", "bert", "roberta"):
        sizes["max_positions"] = 8
    config = model_config(family, **{**sizes, **fields})
    values = {path: np.zeros(p.shape, np.float32) for path, p in flatten(Network(config).spec).items()}
    return jaxlm.LM(config, unflatten(values))


def compressed():
    """A model with what only the native layout holds: nested Weights, four bits, sites, sparse storage."""
    lm = small("llama", hidden_size=32, ffn_size=64)
    flat = dict(flatten(lm.params))
    up = flat["layers_0/mlp/up/kernel"]
    mask = np.arange(up.size).reshape(up.shape) % 2 == 0
    key = flat["layers_0/attention/key/kernel"]
    codes = np.zeros(key.shape, Scheme("int4").dtype)
    scale = np.ones((2, key.shape[1]), np.float32)
    grouped = Quantized(codes, scale, scheme=Scheme("int4", 16))
    low = [np.zeros(shape, np.float32) for shape in ((key.shape[0], 2), (2, key.shape[1]))]
    weights = {
        "layers_0/mlp/up/kernel": Masked(up + mask, mask),
        "layers_0/attention/key/kernel": LowRank(grouped, *low, scale=0.5, rate=0.1),
        "layers_0/mlp/gate": Gate(np.ones(64, np.float32)),
        "layers_1/mlp/gate": HardConcrete(np.ones(64, np.float32), speed=2.0),
    }
    axes = {"layers_0/mlp/gate": ("ffn",), "layers_1/mlp/gate": ("ffn",)}
    return jaxlm.LM(lm.config, unflatten({**flat, **weights}), axes=axes, carried={"eos_token_id": 3})


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory of every family and of the native layout, by name; each in the file that its tests change."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        jaxlm.save(small(family), root / family)
        (root / family / OWN).unlink()
    for head, labels in (("sequence", ("a", "b", "c")), ("token", ("O", "B-X"))):
        jaxlm.save(small("bert", head=head, labels=labels), root / head)
        (root / head / OWN).unlink()
    jaxlm.save(small("qwen2"), root / "ours")
    jaxlm.save(compressed(), root / "native")
    jaxlm.save(small("gpt2"), root / "shards", max_shard_bytes=2000)
    return root


def edited(path, **changes):
    """The JSON file with some entries changed."""
    path.write_text(json.dumps(read_json(path) | changes))


def refused(directory, *texts, **options):
    """Loading fails at once with all these texts in the message."""
    began = time.monotonic()
    with pytest.raises(ValueError) as error:
        jaxlm.load(directory, **options)
    assert time.monotonic() - began < 1
    assert all(text in str(error.value) for text in (*texts, str(directory))), error.value
