"""Clustering: errors that fall with k, exactness, determinism, and a codebook that learns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Masked, Method, Quantized, dot, materialize
from jaxlm.methods.share.clustered import Clustered
from jaxlm.methods.share.clustering import cluster, clustered, kmeans

DENSE = np.asarray(jax.random.normal(jax.random.key(0), (32, 24)))


def error(w, k, group=None):
    return float(np.square(np.asarray(clustered(w, k, group).materialize()) - w).sum())


def test_the_error_falls_with_k_and_with_groups():
    errors = [error(DENSE, k) for k in (2, 4, 8, 16, 32, 64, 256)]
    assert all(more > 1.5 * less for more, less in itertools.pairwise(errors))
    assert error(DENSE, 16, group=8) < error(DENSE, 16, group=16) < error(DENSE, 16)


@pytest.mark.parametrize("k", [5, 6, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_many_values_as_there_are_is_exact(k, dtype):
    w = jnp.asarray(np.random.default_rng(0).choice([-0.7, -0.1, 0.0, 0.3, 2.5], (32, 24)), dtype)
    leaf = clustered(w, k)
    assert leaf.dtype == dtype and np.array_equal(leaf.materialize(), w)


def test_every_entry_has_its_nearest_value_and_every_value_is_a_mean():
    codebook, codes = kmeans(DENSE, 8)
    assert np.array_equal(codes, np.abs(DENSE[..., None] - codebook).argmin(-1))
    assert np.allclose(codebook, [DENSE[codes == i].mean() for i in range(8)])
    again, same = kmeans(DENSE, 8)
    assert np.array_equal(again, codebook) and np.array_equal(same, codes)


def test_the_optimum_of_well_separated_clusters_is_found():
    """Also where an even spread leaves clusters empty at first."""
    centres = np.array([0.0, 0.1, 0.2, 50.0, 1000.0])
    values = (centres[:, None] + 0.001 * np.random.default_rng(0).normal(size=(5, 40))).reshape(-1)
    codebook, codes = kmeans(values, 5)
    assert np.allclose(codebook, centres, atol=0.001) and np.array_equal(codes, np.repeat(np.arange(5), 40))


def test_better_than_an_even_grid():
    grid = np.linspace(DENSE.min(), DENSE.max(), 16)
    nearest = grid[np.abs(DENSE[..., None] - grid).argmin(-1)]
    assert error(DENSE, 16) < 0.85 * np.square(nearest - DENSE).sum()


def test_the_gradient_of_a_value_is_the_sum_over_its_entries():
    w, x = clustered(DENSE, 8, group=16), jax.random.normal(jax.random.key(1), (5, 32))
    loss = lambda leaf: jnp.sum(jnp.sin(dot(x, leaf)))  # noqa: E731
    dense = np.asarray(jax.grad(loss)(w.materialize()))
    of_values = jax.grad(lambda book: loss(w.replace(codebook=book)))(w.codebook)
    codes, groups = np.asarray(w.codes), np.asarray(w.groups)
    for group in range(2):
        for value in range(8):
            entries = (codes == value) & (groups == group)[:, None]
            assert np.isclose(of_values[group, value], dense[entries].sum(), rtol=1e-4, atol=1e-4)


def test_only_the_codebook_trains(run):
    followed = run.follow(Method(), 6, wrap=lambda values, i: clustered(values, 8))
    first, last = run.leaf(followed.states[0]), run.leaf(followed.states[-1])
    assert isinstance(last, Clustered) and np.array_equal(first.codes, last.codes)
    assert (np.asarray(first.codebook) != np.asarray(last.codebook)).all()


def test_below_a_mask_only_what_is_kept_is_clustered(run):
    """Prune, then cluster: zeros take no value of the codebook."""
    mask = np.abs(DENSE) > 0.7
    leaf = Masked(jnp.where(mask, DENSE, 0), jnp.asarray(mask))
    params = {"layers_0": {"up": {"kernel": leaf}}, "head": {"kernel": jnp.asarray(DENSE)}}
    small = cluster(run.lm_of(params), values=8)
    after = small.params["layers_0"]["up"]["kernel"]
    assert isinstance(after, Masked) and isinstance(after.base, Clustered)
    assert small.params["head"]["kernel"] is params["head"]["kernel"]
    dense = np.asarray(after.materialize())
    assert not dense[~mask].any()
    assert (
        np.square(dense - DENSE * mask).sum()
        < np.square(np.asarray(clustered(DENSE * mask, 8).materialize()) - DENSE * mask).sum()
    )
    assert np.allclose(np.asarray(after.base.codebook)[0], kmeans(DENSE[mask], 8)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": 1}, "values must be 2 to 256"),
        ({"values": 257}, "values must be 2 to 256"),
        ({"group": 0}, "group must be at least 1"),
        ({"targets": "x"}, "targets 'x' match no parameter"),
        ({}, "layers_0/up/kernel holds a Quantized.*bake it first"),
    ],
)
def test_what_cannot_be(run, arguments, message):
    params = {"layers_0": {"up": {"kernel": Quantized.of(jnp.asarray(DENSE))}}}
    with pytest.raises(ValueError, match=message):
        cluster(run.lm_of(params), **arguments)


def test_tables_too():
    w = clustered(DENSE, 16, group=8)
    ids = jnp.array([[3, 31], [8, 8]])
    assert np.array_equal(w.take(ids, None), np.asarray(materialize(w))[np.asarray(ids)])


def test_layers_of_a_stack_have_codebooks_of_their_own():
    """What methods see that compare entries between layers of the run view."""
    layers = [clustered(w, 4, group=8) for w in np.random.default_rng(0).normal(size=(3, 16, 6)).astype(np.float32)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    assert np.array_equal(materialize(stack), [materialize(layer) for layer in layers])
