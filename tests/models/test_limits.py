"""What a model cannot do is said, not computed."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm.generate.decoding import generate
from jaxlm.models import model_config
from jaxlm.models.network import Network


@pytest.fixture(scope="module")
def model():
    return Network(model_config("gpt2", vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, max_positions=6))


def test_rows_longer_than_the_table_of_positions_are_refused(model):
    params = model.abstract()
    batch = {"input_ids": jnp.zeros((1, 7), jnp.int32)}
    with pytest.raises(ValueError, match=r"rows of 7 tokens, but the model has 6 positions.*max_length"):
        jax.eval_shape(model.forward, params, batch)
    jax.eval_shape(model.forward, params, {"input_ids": batch["input_ids"][:, :6]})


def test_generation_beyond_the_table_of_positions_is_refused(model):
    batch = {"input_ids": jnp.zeros((1, 4), jnp.int32)}
    params = model.init(jax.random.key(0))
    assert generate(model.config, params, batch, jax.random.key(0), new_tokens=3).shape == (1, 3)
    with pytest.raises(ValueError, match="6 positions"):
        generate(model.config, params, batch, jax.random.key(0), new_tokens=4)


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_that_chooses_among_no_token_is_refused(model, setting):
    batch = {"input_ids": jnp.zeros((1, 2), jnp.int32)}
    with pytest.raises(ValueError, match=next(iter(setting))):
        generate(model.config, {}, batch, jax.random.key(0), new_tokens=1, **setting)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "head_dropout"])
def test_a_rate_of_one_is_refused(rate):
    with pytest.raises(ValueError, match=rate):
        model_config("gpt2", vocab_size=11, **{rate: 1.0})
