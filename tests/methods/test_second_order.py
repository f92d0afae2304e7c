"""SparseGPT and Wanda: masks, errors against magnitude, and the exact solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods.prune.unstructured.patterns import keep
from jaxlm.methods.prune.unstructured.sparsegpt import sparsegpt_matrix
from jaxlm.methods.prune.unstructured.wanda import wanda_mask
from jaxlm.methods.second_order import cholesky, inverse_factor

IN, OUT, ROWS = 48, 20, 200


def inputs(seed=0, rows=ROWS, size=IN, correlated=True):
    """Tokens whose channels are correlated and of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, size)) * np.exp(rng.normal(size=size))
    if correlated:
        x += rng.normal(size=(rows, 6)) @ rng.normal(size=(6, size)) * 2
    return x


X, W = inputs(), np.random.default_rng(9).normal(size=(IN, OUT)).astype(np.float32)
H = X.T @ X


def error(w, x=X):
    return float(np.linalg.norm(x @ (W - np.asarray(w, np.float64))))


def factor(h=H, damping=0.01):
    return inverse_factor(h, damping, "test", "w")


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (None, "2:4"), (None, "1:4")])
def test_sparsegpt_then_wanda_then_magnitude(sparsity, pattern):
    magnitude = W * np.asarray(keep(jnp.abs(W), sparsity, pattern, "matrix"))
    wanda = W * np.asarray(wanda_mask(W, np.linalg.norm(X, axis=0), sparsity, pattern))
    pruned, mask = sparsegpt_matrix(W, factor(), sparsity, pattern)
    assert error(pruned) < 0.8 * error(wanda) and error(wanda) < error(magnitude)
    assert not np.asarray(pruned)[~np.asarray(mask)].any()


def test_shares_are_exact():
    mask = np.asarray(wanda_mask(W, np.linalg.norm(X, axis=0), 0.25))
    assert (mask.sum(0) == IN * 3 // 4).all()
    _, mask = sparsegpt_matrix(W, factor(), None, "1:4")
    groups = np.asarray(mask).reshape(IN // 4, 4, OUT)
    assert (groups.sum(1) == 1).all(), "one of four stays, along the inputs"
    _, mask = sparsegpt_matrix(W, factor(), 0.3, block=20)
    assert [int((~part).sum()) for part in np.split(np.asarray(mask), [20, 40])] == [120, 120, 48]


def test_without_correlation_sparsegpt_is_magnitude_times_the_inputs_norm():
    """H diagonal: nothing can make up for anything, and `w²/U_ii²` is `w² (H_ii + λ)`."""
    scale = np.exp(np.random.default_rng(3).normal(size=IN))
    pruned, mask = sparsegpt_matrix(W, factor(np.diag(scale**2), damping=0.0), 0.5)
    expected = np.asarray(wanda_mask(W, scale, 0.5, per="matrix"))
    assert np.array_equal(mask, expected)
    assert np.allclose(pruned, W * expected, rtol=1e-5, atol=1e-7)


def test_the_weights_that_stay_are_those_of_least_squares():
    """One output, one block, the last rows kept: what follows the pruned rows solves the normal equations exactly."""
    h = H + 0.01 * np.diagonal(H).mean() * np.eye(IN)
    w = W[:, :1].astype(np.float64)
    w[: IN // 2] *= 1e-6  # these go
    pruned, mask = sparsegpt_matrix(jnp.asarray(w, jnp.float32), factor(), 0.5)
    dropped = ~np.asarray(mask)[:, 0]
    assert np.array_equal(dropped, np.arange(IN) < IN // 2)
    kept = ~dropped
    solved = np.linalg.solve(h[kept][:, kept], (h @ w)[kept])
    assert np.allclose(np.asarray(pruned)[kept], solved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [16, 20, 128])
def test_blocks_change_nothing_but_where_masks_are_chosen(block):
    """Under N:M the masks come from groups of four, so any block gives the same."""
    expected, mask = sparsegpt_matrix(W, factor(), None, "2:4", block=48)
    pruned, same = sparsegpt_matrix(W, factor(), None, "2:4", block=block)
    assert np.array_equal(mask, same) and np.allclose(pruned, expected, rtol=1e-3, atol=1e-4)


def test_the_factor_is_that_of_the_inverse():
    u = np.asarray(factor(), np.float64)
    h = H + 0.01 * np.diagonal(H).mean() * np.eye(IN)
    assert not np.tril(u, -1).any() and np.allclose(u.T @ u @ h, np.eye(IN), atol=1e-3)


def test_degenerate_inputs():
    """Dead inputs, constant ones, a single token: a result without NaN."""
    dead = X.copy()
    dead[:, [0, 7]] = 0
    for x in (dead, np.ones((ROWS, IN)), X[:1]):
        pruned, mask = sparsegpt_matrix(W, factor(x.T @ x), 0.5)
        assert np.isfinite(pruned).all() and int(mask.sum()) == W.size // 2
    assert np.isfinite(wanda_mask(W, np.zeros(IN), 0.5)).all()


def test_failures_name_the_parameter():
    with pytest.raises(ValueError, match="gptq: every input of layers_3/mlp/down/kernel is 0"):
        cholesky(np.zeros((3, 3)), 0.01, "gptq", "layers_3/mlp/down/kernel")
    with pytest.raises(ValueError, match="the inputs of w are not finite"):
        cholesky(np.full((3, 3), np.nan), 0.01, "gptq", "w")
    with pytest.raises(ValueError, match=r"inputs of w have no Cholesky factor, .* raise the damping"):
        cholesky(np.array([[1.0, 1e9], [1e9, 1.0]]), 0.01, "gptq", "w")


def test_damping_grows_until_there_is_a_factor():
    h = np.array([[1.0, 1.05], [1.05, 1.0]])
    lower = cholesky(h, 0.01, "gptq", "w")
    assert np.allclose(lower @ lower.T, h + 0.1 * np.eye(2)), "0.01 is too little, 0.1 is enough"
    key = jax.random.normal(jax.random.key(0), (4, 2))
    assert np.isfinite(cholesky(np.asarray(key @ key.T), 0.0, "gptq", "w")).all(), "rank 2 of 4, no damping asked for"
