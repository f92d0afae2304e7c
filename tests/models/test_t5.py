import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.position import relative_bucket

pytestmark = pytest.mark.torch

SMALL = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}


def build(kind="T5ForConditionalGeneration", **settings):
    import transformers

    config = transformers.T5Config(**{**SMALL, **settings})
    return getattr(transformers, kind)(config)


def test_original(parity):
    lm = parity(build(num_decoder_layers=3, d_kv=12))
    assert lm.config.tie_embeddings and lm.config.scale_head


def test_version_1_1_has_a_head_of_its_own(parity, tmp_path):
    import torch

    model = build(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.shared.weight))
    lm = parity(model)
    assert not lm.config.tie_embeddings and not lm.config.scale_head and lm.config.gated


def test_encoder_alone(parity):
    parity(build("T5EncoderModel"), ours="last_hidden", theirs="last_hidden_state")


def test_without_head(parity):
    parity(build("T5Model"), ours="last_hidden", theirs="last_hidden_state")


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_the_same_at_every_distance(causal):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), not causal, 32, 128).numpy()
    assert np.array_equal(relative_bucket(jnp.asarray(distance), causal, 32, 128), theirs)
