"""Products and their gradients against plain ones, in both dtypes, whatever the number of axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import PRODUCT, matmul, matmul_transposed

pytestmark = pytest.mark.slow

SHAPES = [(5,), (2, 5), (3, 2, 5), (2, 1, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_value_and_gradients_in_float32(shape, transposed):
    x = jax.random.normal(jax.random.key(0), shape)
    w = jax.random.normal(jax.random.key(1), (4, 5) if transposed else (5, 4))
    cotangent = jax.random.normal(jax.random.key(2), (*shape[:-1], 4))
    product = matmul_transposed if transposed else matmul
    plain = (lambda x, w: x @ w.T) if transposed else (lambda x, w: x @ w)
    value, gradients = jax.value_and_grad(lambda x, w: jnp.sum(product(x, w) * cotangent), (0, 1))(x, w)
    expected, expected_gradients = jax.value_and_grad(lambda x, w: jnp.sum(plain(x, w) * cotangent), (0, 1))(x, w)
    assert np.isclose(value, expected, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert np.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_bfloat16_operands_are_accumulated_in_float32(shape, transposed):
    """Against float64 products of the rounded operands; the gradient of the weight is not rounded again."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (4, 5) if transposed else (5, 4))
    g = jax.random.normal(jax.random.key(2), (*shape[:-1], 4), jnp.bfloat16)
    y, back = jax.vjp(matmul_transposed if transposed else matmul, x, w)
    dx, dw = back(g)
    wide = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)  # noqa: E731
    kernel = wide(w).T if transposed else wide(w)
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert np.allclose(wide(y), wide(x) @ kernel, rtol=2**-7, atol=1e-6)
    assert np.allclose(wide(dx), wide(g) @ kernel.T, rtol=2**-7, atol=1e-6)
    outer = wide(x).reshape(-1, 5).T @ wide(g).reshape(-1, 4)
    assert np.allclose(dw, outer.T if transposed else outer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_result_in_float32_is_the_accumulator(transposed):
    """Of rounded operands, itself not rounded; the gradients are those of a result in bfloat16."""
    product = matmul_transposed if transposed else matmul
    x = jax.random.normal(jax.random.key(0), (2, 3, 5), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (4, 5) if transposed else (5, 4))
    g = jax.random.normal(jax.random.key(2), (2, 3, 4), jnp.bfloat16)
    y, back = jax.vjp(lambda x, w: product(x, w, jnp.float32), x, w)
    kernel = np.asarray(w.astype(jnp.bfloat16), np.float64)
    assert y.dtype == jnp.float32
    assert np.allclose(y, np.asarray(x, np.float64) @ (kernel.T if transposed else kernel), rtol=1e-6, atol=1e-6)
    for a, b in zip(back(g.astype(jnp.float32)), jax.vjp(product, x, w)[1](g), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_under_scan_vmap_and_remat():
    kernels = jax.random.normal(jax.random.key(1), (3, 5, 5)) * 0.3
    x = jax.random.normal(jax.random.key(0), (2, 4, 5))

    def loss(kernels, product):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(product(x, w)), None))
        return jnp.sum(jax.lax.scan(step, x, kernels)[0] ** 2)

    gradient, expected = (jax.grad(loss)(kernels, product) for product in (matmul, jnp.matmul))
    assert np.allclose(gradient, expected, atol=1e-5)
    batched = jax.vmap(jax.grad(lambda w, x: jnp.sum(matmul(x, w) ** 2)), (None, 0))(kernels[0], x)
    expected = jax.vmap(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), (None, 0))(kernels[0], x)
    assert np.allclose(batched, expected, atol=1e-4)


def test_codes_are_widened_and_have_no_gradient():
    codes, x = jnp.array([[1, -2], [3, 4]], jnp.int8), jnp.array([[1.0, 2.0]])
    assert matmul(x, codes).tolist() == [[7, 6]] and matmul_transposed(x, codes).tolist() == [[-3, 11]]
    assert jax.grad(lambda x: matmul(x, codes).sum())(x).tolist() == [[-1, 7]]


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.uint16)])
def test_results_are_kept_by_name_and_bfloat16_as_bits(dtype, bits):
    """Of a layer of two products, what lies between them is kept; the activation of it is not."""
    x, w = jnp.ones((2, 3, 5), dtype), jnp.ones((5, 7), dtype)
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    layer = jax.checkpoint(lambda x, w: matmul_transposed(jnp.sin(matmul(x, w)), w), policy=policy)
    pull = jax.eval_shape(lambda x, w: jax.vjp(layer, x, w)[1], x, w)
    kept = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull)]
    assert kept.count(((2, 3, 7), bits)) == 1 and sum(shape == (2, 3, 7) for shape, _ in kept) == 1


def test_second_derivatives_in_float32():
    x, w = jnp.array([[1.0, 2.0]]), jnp.array([[0.5], [1.5]])
    loss = lambda x: jnp.sum(matmul(x, w) ** 2)  # noqa: E731
    second = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x)
    y, square = 3.5, 0.5**2 + 1.5**2
    # The gradient is 2 y w, its squared length 4 y² |w|², and the gradient of that 8 y |w|² w.
    np.testing.assert_allclose(second, [[8 * y * square * 0.5, 8 * y * square * 1.5]], rtol=1e-5)
