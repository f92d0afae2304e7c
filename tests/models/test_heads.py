"""Logits are float32 sums of products of the operands, not those sums rounded to the dtype of the activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxlm.core import Context
from jaxlm.core.weights import Factored, InputScaled, Masked, Quantized, Scheme
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.models import model_config
from jaxlm.models.heads import apply_head, last_token

VOCAB, WIDTH = 37, 16


def normal(seed, *shape):
    return 0.3 * jax.random.normal(jax.random.key(seed), shape)


def small(a):
    """As the operand of a product with bfloat16 activations."""
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)


TABLE = normal(0, VOCAB, WIDTH)
OPEN = jax.random.bernoulli(jax.random.key(1), 0.6, TABLE.shape)
A, B = normal(2, VOCAB, 4), normal(3, 4, WIDTH)
CODED = Quantized.of(TABLE, Scheme("int4"), channel=-2)
SCALE = jnp.exp(normal(4, VOCAB))
WEIGHTS = {  # tables [vocab, width], and what they give for hidden states h [.., width]
    "array": (TABLE, lambda h: h @ small(TABLE).T),
    "Masked": (Masked(TABLE, OPEN), lambda h: h @ small(TABLE * OPEN).T),
    "Quantized": (CODED, lambda h: h @ np.asarray(CODED.codes, np.float64).T * np.asarray(CODED.scale, np.float64).T),
    "LowRank": (
        LowRank(TABLE, A, B, scale=0.5),
        lambda h: h @ small(TABLE).T + 0.5 * small(h @ small(B).T) @ small(A).T,
    ),
    "Factored": (Factored(A, B), lambda h: small(h @ small(B).T) @ small(A).T),
    "InputScaled": (InputScaled(TABLE, SCALE), lambda h: h @ small(TABLE).T * np.asarray(SCALE, np.float64)),
}
HIDDEN = jax.random.normal(jax.random.key(5), (2, 3, WIDTH), jnp.bfloat16)


def logits(config, params, hidden=HIDDEN):
    result = apply_head(config, params, hidden, jnp.ones(hidden.shape[:2], jnp.int32), Context())["logits"]
    assert result.dtype == jnp.float32
    return np.asarray(result)


def close(ours, exact):
    assert np.abs(ours - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_tied_head_of_bfloat16_hidden_states(name):
    table, exact = WEIGHTS[name]
    config = model_config("gpt2", vocab_size=VOCAB, hidden_size=WIDTH, num_layers=1, num_heads=2)
    ours = logits(config, {"embed": {"tokens": {"embedding": table}}})
    close(ours, exact(np.asarray(HIDDEN, np.float64)))
    labels = jnp.array([[3, IGNORED, 0], [36, 1, 2]])
    likelihood = np.take_along_axis(log_softmax(ours.astype(np.float64), -1), np.maximum(labels, 0)[..., None], -1)
    assert float(cross_entropy(jnp.asarray(ours), labels).sum) == pytest.approx(
        -likelihood[np.asarray(labels) >= 0].sum(), rel=1e-6
    )


@pytest.mark.parametrize("kernel", [TABLE.T, Quantized.of(TABLE.T)], ids=["array", "Quantized"])
def test_a_head_of_its_own(kernel):
    config = model_config("llama", vocab_size=VOCAB, hidden_size=WIDTH, num_layers=1, num_heads=2, tie_embeddings=False)
    ours = logits(config, {"head": {"output": {"kernel": kernel}}})
    if isinstance(kernel, Quantized):
        close(ours, np.asarray(HIDDEN, np.float64) @ np.asarray(kernel.codes, np.float64) * np.asarray(kernel.scale))
    else:
        close(ours, np.asarray(HIDDEN, np.float64) @ small(kernel))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bias_is_added_in_float32(dtype):
    """Of a classifier, and of the tied head of masked language modelling, whatever the parameters' own dtype."""
    structure = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": 1, "num_heads": 2}
    bias = (100 + normal(6, VOCAB)).astype(dtype)
    config = model_config("bert", **structure, head="token", labels=tuple(map(str, range(VOCAB))))
    ours = logits(config, {"head": {"output": {"kernel": TABLE.T.astype(dtype), "bias": bias}}})
    close(ours, np.asarray(HIDDEN, np.float64) @ small(TABLE.T) + np.asarray(bias, np.float64))
    config = model_config("bert", **structure, head="masked", activation="relu")
    head = {
        "transform": {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)},
        "norm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
        "output": {"bias": bias},
    }
    ours = logits(config, {"embed": {"tokens": {"embedding": TABLE.astype(dtype)}}, "head": head})
    h = np.maximum(np.asarray(HIDDEN, np.float32), 0)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + config.norm_eps)
    close(ours, small(h) @ small(TABLE).T + np.asarray(bias, np.float64))


def test_the_last_token_of_padded_rows():
    segments = jnp.array([[1, 1, 2, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert last_token(segments).tolist() == [2, 3, 2, 0]
