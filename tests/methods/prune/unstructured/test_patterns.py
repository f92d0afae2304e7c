"""Patterns: exact counts with ties, groups along the inputs, blocks, budgets over several matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods.prune.unstructured.patterns import (
    check_shape,
    final_sparsity,
    keep,
    keep_largest,
    keep_together,
    parse_pattern,
    ranks,
)

SCORES = {
    "random": jax.random.uniform(jax.random.key(0), (24, 16)),
    "ties": jax.random.randint(jax.random.key(0), (24, 16), 0, 3).astype(jnp.float32),
    "zeros": jnp.zeros((24, 16)),
}
kinds = pytest.mark.parametrize("kind", SCORES)


def dropped_least(scores, mask):
    """Nothing that was dropped is worth more than what was kept."""
    scores, mask = np.asarray(scores), np.asarray(mask)
    return mask.all() or not mask.any() or scores[mask].min() >= scores[~mask].max()


@kinds
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_exactly_as_many_as_asked_for(kind, sparsity):
    scores = SCORES[kind][:13, :13]
    mask = np.asarray(keep_largest(scores, sparsity))
    assert (~mask).sum() == round(sparsity * 169) and dropped_least(scores, mask)
    assert np.array_equal(keep(scores, sparsity), mask)


@kinds
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_each_output_drops_its_own_share(kind, sparsity):
    mask = np.asarray(keep(SCORES[kind], sparsity, per="output"))
    assert ((~mask).sum(axis=0) == round(sparsity * 24)).all()
    assert all(dropped_least(SCORES[kind][:, j], mask[:, j]) for j in range(16))


@kinds
@pytest.mark.parametrize(("kept", "group"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)])
def test_n_of_m_are_kept_along_the_inputs(kind, kept, group):
    """1:4 and 3:4 tell kept from removed, which 2:4 cannot."""
    mask = np.asarray(keep(SCORES[kind], None, f"{kept}:{group}"))
    groups = mask.reshape(-1, group, 16)
    assert (groups.sum(axis=1) == kept).all()
    values = np.asarray(SCORES[kind]).reshape(-1, group, 16)
    assert all(
        dropped_least(values[g, :, j], groups[g, :, j]) for g in range(groups.shape[0]) for j in range(groups.shape[2])
    )
    assert np.array_equal(keep(SCORES[kind], 1 - kept / group, f"{kept}:{group}", per="output"), mask)


def test_groups_are_emptied_one_after_the_other():
    counts = [int(np.asarray(keep(SCORES["random"], s, "1:4"))[:4, 0].sum()) for s in (0.0, 0.2, 0.3, 0.5, 0.75, 0.9)]
    assert counts == [4, 3, 3, 2, 1, 1]


@kinds
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (1, 8), (3, 1), (24, 16)])
def test_blocks_go_together(kind, rows, columns):
    mask = np.asarray(keep(SCORES[kind], 0.4, f"block:{rows}x{columns}"))
    blocks = mask.reshape(24 // rows, rows, 16 // columns, columns).swapaxes(1, 2).reshape(-1, rows * columns)
    assert (blocks.all(axis=1) | ~blocks.any(axis=1)).all()
    assert (~blocks[:, 0]).sum() == round(0.4 * len(blocks))
    sums = np.asarray(SCORES[kind]).reshape(24 // rows, rows, 16 // columns, columns).sum(axis=(1, 3)).reshape(-1)
    assert blocks[:, 0].all() or sums[blocks[:, 0]].min(initial=np.inf) >= sums[~blocks[:, 0]].max() - 1e-6


def test_a_column_of_blocks_is_an_output():
    mask = np.asarray(keep(SCORES["random"], 0.5, "block:4x2", per="output"))
    assert ((~mask[::4, ::2]).sum(axis=0) == 3).all()


@kinds
def test_a_budget_over_all_matrices(kind):
    scores = {"a": SCORES[kind], "b": 2 * SCORES[kind][None, :8] + jnp.zeros((3, 1, 1)), "c": SCORES[kind][:3] * 0}
    masks = {name: np.asarray(mask) for name, mask in keep_together(scores, 0.4).items()}
    assert {n: m.shape for n, m in masks.items()} == {n: s.shape for n, s in scores.items()}
    flat = np.concatenate([m.reshape(-1) for m in masks.values()])
    assert (~flat).sum() == round(0.4 * flat.size)
    assert dropped_least(np.concatenate([np.asarray(s).reshape(-1) for s in scores.values()]), flat)
    alone = keep_together({"a": SCORES[kind]}, 0.4, "block:4x4")["a"]
    assert np.array_equal(alone, keep(SCORES[kind], 0.4, "block:4x4"))


def test_ranks_are_stable_along_any_axis():
    scores = np.asarray(SCORES["ties"])
    for axis in (0, 1):
        expected = np.argsort(np.argsort(scores, axis=axis, kind="stable"), axis=axis, kind="stable")
        assert np.array_equal(ranks(SCORES["ties"], axis=axis), expected)


@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "block:2x4"])
def test_the_same_when_stacked_and_compiled(pattern):
    stacked = jnp.stack([SCORES["random"], SCORES["ties"]])
    shares = jnp.array([0.25, 0.75])
    compiled = jax.jit(jax.vmap(functools.partial(keep, pattern=pattern)))(stacked, shares)
    for mask, scores, share in zip(compiled, stacked, shares, strict=True):
        assert np.array_equal(mask, keep(scores, float(share), pattern))


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "block:0x4", "block:4", "rows", ""])
def test_unknown_patterns(text):
    with pytest.raises(ValueError, match="unknown sparsity pattern"):
        parse_pattern(text)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"layers_0/x: its 10 inputs are not a multiple of 4"):
        check_shape((10, 8), "2:4", "layers_0/x")
    with pytest.raises(ValueError, match="its 9 outputs are not a multiple of 4"):
        keep(jnp.ones((8, 9)), 0.5, "block:2x4")
    with pytest.raises(ValueError, match="per must be"):
        keep(jnp.ones((8, 9)), 0.5, per="row")
    with pytest.raises(ValueError, match="needs a sparsity"):
        keep(jnp.ones((8, 9)), None)
    with pytest.raises(ValueError, match="fixes the share of every group"):
        keep_together({"a": jnp.ones((8, 8))}, 0.5, "2:4")
    with pytest.raises(ValueError, match=r"magnitude: the pattern 1:4 has a sparsity of 0\.75, not 0\.5"):
        final_sparsity(0.5, "1:4", "magnitude")
    with pytest.raises(ValueError, match="magnitude: sparsity must be in"):
        final_sparsity(None, "unstructured", "magnitude")
