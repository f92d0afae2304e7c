"""Prune and regrow: constant counts, and exactly the largest gradients grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Step, flatten, unflatten
from jaxlm.methods.prune.unstructured.patterns import keep
from jaxlm.methods.prune.unstructured.regrow import exchange, regrow


def by_hand(mask, weight, gradient, kept, grown):
    """A list of entries, dropped and grown one by one."""
    alive = sorted(np.flatnonzero(mask), key=lambda i: -abs(weight[i]))[: kept - grown]
    others = sorted(set(range(mask.size)) - set(alive), key=lambda i: -abs(gradient[i]))[:grown]
    kept_entries = np.zeros(mask.size, bool)
    kept_entries[[*alive, *others]] = True
    return kept_entries


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sparsity", [0.25, 0.8])
def test_the_smallest_go_and_the_largest_gradients_grow(fraction, sparsity):
    weight, gradient = (jax.random.normal(jax.random.key(s), (12, 10)) for s in (0, 1))
    mask = keep(jnp.abs(weight), sparsity)
    new = np.asarray(exchange(mask, weight, gradient, sparsity, fraction))
    kept = 120 - round(sparsity * 120)
    expected = by_hand(
        np.ravel(mask), np.ravel(weight * mask), np.ravel(gradient), kept, int(np.round(np.float32(fraction) * kept))
    )
    assert np.array_equal(new.reshape(-1), expected) and new.sum() == kept


def test_in_every_output_and_every_group():
    weight, gradient = (jax.random.normal(jax.random.key(s), (12, 10)) for s in (0, 1))
    new = np.asarray(exchange(keep(jnp.abs(weight), 0.5, per="output"), weight, gradient, 0.5, 0.5, per="output"))
    assert (new.sum(axis=0) == 6).all()
    for j in range(10):
        mask = np.asarray(keep(jnp.abs(weight), 0.5, per="output"))[:, j]
        assert np.array_equal(new[:, j], by_hand(mask, weight[:, j] * mask, gradient[:, j], 6, 3))
    old = np.asarray(keep(jnp.abs(weight), None, "2:4"))
    new = np.asarray(exchange(old, weight, gradient, None, 0.5, "2:4")).reshape(3, 4, 10)
    assert (new.sum(axis=1) == 2).all()
    for g, j in np.ndindex(3, 10):
        mask, rows = old.reshape(3, 4, 10)[g, :, j], slice(4 * g, 4 * g + 4)
        assert np.array_equal(new[g, :, j], by_hand(mask, weight[rows, j] * mask, gradient[rows, j], 2, 1))


def test_the_count_is_constant_and_what_grows_starts_from_zero(run):
    followed = run.follow(regrow(sparsity=0.75, fraction=0.5, begin=1, end=13, every=4), 16)
    masks = [np.asarray(run.leaf(state).mask) for state in followed.states]
    assert [mask.sum() for mask in masks[1:]] == [32] * 16
    assert [i for i in range(2, 17) if not np.array_equal(masks[i], masks[i - 1])] == [5, 9], "by 13 nothing moves"
    fresh = masks[5] & ~masks[4]
    gradient = np.abs(np.asarray(followed.grads(followed.states[4])))
    assert fresh.any() and not np.asarray(run.leaf(followed.states[5]).base)[fresh].any()
    for layer in range(2):
        never = ~masks[4][layer] & ~masks[5][layer]
        assert gradient[layer][fresh[layer]].min() >= gradient[layer][never].max()
    assert not np.asarray(run.moments(followed.states[5])[0])[fresh].any()
    assert np.asarray(run.leaf(followed.states[6]).base)[fresh].all(), "and then it learns"


@pytest.mark.parametrize(("number", "share"), [(1, 0.5), (5, 0.25), (9, 0.0)])
def test_the_exchanged_share_falls_by_the_cosine(number, share, run):
    """At the start f of the kept entries are grown, half-way half of it, at the end none."""
    weight, gradient = (jax.random.normal(jax.random.key(s), (12, 10)) for s in (0, 1))
    method = regrow(sparsity=0.5, fraction=0.5, begin=1, end=9, every=4)
    path = "layers_0/up/kernel"
    lm, _, state = method.init(jax.random.key(0), run.lm_of(unflatten({path: weight})))
    after = method.update(Step(lm.params, [], state), {f"{path}.base": gradient}, {}, jnp.int32(number))
    new = flatten(after.params)[path]
    assert np.array_equal(new.mask, exchange(jnp.ones((12, 10), bool), weight, gradient, 0.5, share))
    assert np.array_equal(new.base, np.where(new.mask, weight, 0))


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="per must be 'matrix' or 'output'"):
        regrow(sparsity=0.5, end=3, per="model")
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        regrow(sparsity=0.5, end=3, fraction=1.5)
