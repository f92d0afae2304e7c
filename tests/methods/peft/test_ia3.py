"""IA3's products, what it trains, and what baking leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Quantized, describe, dot, trained_names
from jaxlm.methods.peft.ia3 import IA3, ia3

PARAMS = {
    "layers_0": {
        "attention": {n: {"kernel": jnp.eye(4), "bias": jnp.zeros(4)} for n in ("query", "key", "value")},
        "mlp": {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}},
    },
    "head": {"output": {"kernel": jnp.ones((4, 3))}},
}


def test_outputs_are_scaled_and_begin_as_they_were():
    x, w, scale = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 4), (4, 6), (6,)]))
    assert np.array_equal(dot(x, IA3(w, jnp.ones(6))), x @ w)
    assert np.allclose(dot(x, IA3(w, scale)), (x @ w) * scale, rtol=1e-6)
    small = dot(x.astype(jnp.bfloat16), IA3(w, jnp.full(6, 1.001)), dtype=jnp.float32)
    assert np.allclose(small / dot(x.astype(jnp.bfloat16), w, dtype=jnp.float32), 1.001, rtol=1e-6)


def test_one_vector_a_product_and_the_head_train(run):
    start = ia3().init(jax.random.key(0), run.lm_of(PARAMS))
    names = trained_names(describe(start.lm.params), [ia3().trainable])
    vectors = {f"layers_0/{name}/kernel.scale" for name in ("attention/key", "attention/value", "mlp/up")}
    assert names == vectors | {"head/output/kernel"}


def test_baking_multiplies_columns(run):
    lm = run.lm_of({"w": {"kernel": IA3(Quantized.of(jnp.eye(3)), jnp.array([2.0, 1.0, -1.0]))}})
    assert np.allclose(ia3().bake(lm, {}).params["w"]["kernel"], np.diag([2.0, 1.0, -1.0]), atol=1e-6)


def test_what_it_cannot_do_is_refused(run):
    with pytest.raises(ValueError, match=r"ia3: targets.*kernal.* matches no parameter"):
        ia3(targets=r".*/kernal").init(jax.random.key(0), run.lm_of(PARAMS))
    lm = run.lm_of({"key": {"kernel": Quantized.of(jnp.eye(8), dynamic=True)}})
    with pytest.raises(ValueError, match=r"ia3: key/kernel quantizes its inputs.*dynamic = False"):
        ia3(targets=r"key/kernel").init(jax.random.key(0), lm)
