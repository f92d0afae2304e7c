"""A padded vocabulary changes neither the network nor its gradients, and comes off again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import FakeQuant, Masked, Quantized, arrays, attend, axis_names, dim, initialize, materialize
from jaxlm.core.parameter import Parameter
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.parallel import mask_padded_logits, pad_vocab, unpad_vocab

SPEC = {
    "table": {"embedding": Parameter((dim(vocab=5), dim(embed=4)), std=1.0)},
    "output": {"kernel": Parameter((dim(embed=4), dim(vocab=5)), std=1.0), "bias": Parameter((dim(vocab=5),))},
}
AXES = axis_names(SPEC)
WEIGHTS = {
    "array": lambda w: w,
    "quantized rows": lambda w: Quantized.of(w, channel=-2),
    "quantized": lambda w: Quantized.of(w, dynamic=True),
    "masked": lambda w: Masked(w, w > 0),
    "qat": lambda w: FakeQuant(w, channel=-2),
    "qlora": lambda w: LowRank(Quantized.of(w, channel=-2), jnp.ones((5, 2)), jnp.ones((2, 4))),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_padding_keeps_the_function_and_comes_off(kind):
    params = initialize(jax.random.key(0), SPEC)
    params["table"]["embedding"] = WEIGHTS[kind](params["table"]["embedding"])
    padded = pad_vocab(params, AXES, 4)
    table = padded["table"]["embedding"]
    assert materialize(table).shape == (8, 4)
    assert padded["output"]["kernel"].shape == (4, 8) and padded["output"]["bias"].shape == (8,)
    x = jax.random.normal(jax.random.key(1), (2, 4))
    np.testing.assert_allclose(attend(x, table)[:, :5], attend(x, params["table"]["embedding"]), rtol=1e-6)
    back = unpad_vocab(padded, AXES, 5)
    for name, value in arrays(params).items():
        np.testing.assert_array_equal(arrays(back)[name], value)


def test_padded_entries_have_no_probability_and_no_gradient():
    params = pad_vocab(initialize(jax.random.key(0), SPEC), AXES, 4)
    x = jax.random.normal(jax.random.key(1), (2, 4))

    def loss(kernel):
        return -jax.nn.log_softmax(mask_padded_logits(x @ kernel, 5))[:, 2].sum()

    value, grad = jax.value_and_grad(loss)(params["output"]["kernel"])
    np.testing.assert_allclose(value, loss(params["output"]["kernel"][:, :5]), rtol=1e-6)
    assert np.isfinite(grad).all() and not np.asarray(grad)[:, 5:].any()
    probabilities = jax.nn.softmax(mask_padded_logits(x @ params["output"]["kernel"], 5))
    assert not np.asarray(probabilities)[:, 5:].any()


def test_what_needs_no_padding_is_untouched():
    params = initialize(jax.random.key(0), SPEC)
    assert all(
        a is b for a, b in zip(arrays(params).values(), arrays(pad_vocab(params, AXES, 1)).values(), strict=True)
    )
    abstract = jax.eval_shape(lambda: params)
    assert pad_vocab(abstract, AXES, 4)["table"]["embedding"].shape == (8, 4)
    logits = jnp.ones((2, 5))
    assert mask_padded_logits(logits, 5) is logits
    with pytest.raises(ValueError, match="5 entries for a vocabulary of 6"):
        mask_padded_logits(logits, 6)
    with pytest.raises(ValueError, match="multiple of 0"):
        pad_vocab(params, AXES, 0)
