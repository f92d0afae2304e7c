"""The Cache socket: rows written where each begins, and caches that keep codes, or a ring of places, in its place."""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Tokens, map_leaves
from jaxlm.generate import decoding
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.models.transformer import empty_cache, forward
from jaxlm.nn.cache import Cache, Cached, DenseCache, write_rows

pytestmark = pytest.mark.slow


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


class CodesCache(Cache):
    """int8 codes with a scale for every place and head."""

    codes: tuple[jax.Array, jax.Array]  # of keys and of values
    scales: tuple[jax.Array, jax.Array]
    length: jax.Array

    @classmethod
    def like(cls, cache: DenseCache) -> Self:
        both, scale = (cache.keys.astype(jnp.int8),) * 2, (cache.keys[..., :1],) * 2
        return cls(both, scale, cache.length)

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> Self:
        codes, scales = [], []
        for new, old_codes, old_scales in zip((keys, values), self.codes, self.scales, strict=True):
            scale = jnp.max(jnp.abs(new), axis=-1, keepdims=True) / 127
            codes.append(write_rows(old_codes, jnp.round(new / scale), start))
            scales.append(write_rows(old_scales, scale, start))
        return self.replace(codes=tuple(codes), scales=tuple(scales), length=start + keys.shape[1])

    def read(self) -> Cached:
        keys, values = (c.astype(s.dtype) * s for c, s in zip(self.codes, self.scales, strict=True))
        return Cached(keys, values, jnp.arange(keys.shape[1]) < self.length[:, None])


class RingCache(Cache):
    """The last tokens of every row alone: token i is at place i modulo the number of places."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @classmethod
    def like(cls, cache: DenseCache, places: int) -> Self:
        return cls(cache.keys[:, :places], cache.values[:, :places], cache.length)

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> Self:
        rows = jnp.arange(keys.shape[0])[:, None]
        at = (start[:, None] + jnp.arange(keys.shape[1])) % self.keys.shape[1]
        keys, values = self.keys.at[rows, at].set(keys), self.values.at[rows, at].set(values)
        return self.replace(keys=keys, values=values, length=start + jnp.int32(at.shape[1]))

    def _indices(self) -> jax.Array:
        """Index in the row of the token at every place, negative where there is none: int `[rows, places]`."""
        places, last = self.keys.shape[1], self.length[:, None] - 1
        return last - (last - jnp.arange(places)) % places

    def read(self) -> Cached:
        return Cached(self.keys, self.values, self._indices() >= 0)

    def tokens(self, row: Tokens) -> Tokens:
        indices = jnp.maximum(self._indices(), 0)
        segments, positions = (jnp.take_along_axis(a, indices, axis=1) for a in (row.segments, row.positions))
        return Tokens(segments, indices, positions)


MAKE = {
    "dense": lambda cache: cache,
    "codes": CodesCache.like,
    "ring": lambda cache: RingCache.like(cache, cache.keys.shape[1]),
}


@pytest.mark.parametrize("kind", MAKE)
def test_two_rows_with_a_start_each_are_two_caches(kind):
    empty = MAKE[kind](DenseCache.empty(2, 6, 2, 4))
    write = jax.jit(lambda cache, k, v, start: cache.write(k, v, start))
    both, singles = empty, [jax.tree.map(lambda a, i=i: a[i : i + 1], empty) for i in range(2)]
    for step, (length, start) in enumerate([(2, [0, 0]), (1, [2, 1]), (2, [3, 4]), (1, [0, 5])]):
        keys, values = normal(2 * step, 2, length, 2, 4), normal(2 * step + 1, 2, length, 2, 4)
        both = write(both, keys, values, jnp.array(start))
        for i in range(2):
            row = slice(i, i + 1)
            singles[i] = write(singles[i], keys[row], values[row], jnp.array(start[row]))
            for ours, theirs in zip(both.read(), singles[i].read(), strict=True):
                assert np.array_equal(ours[i], theirs[0])
            assert int(both.read().valid[i].sum()) == start[i] + length
            tolerance = 0.02 if kind == "codes" else 0
            assert np.abs(both.read().keys[i, start[i] : start[i] + length] - keys[i]).max() <= tolerance


def test_a_row_that_begins_anew_forgets_the_one_before():
    cache = DenseCache.empty(1, 4, 1, 1).write(jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1, 1)), jnp.array([0]))
    again = cache.write(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), jnp.array([0]))
    assert again.read().valid.tolist() == [[True, False, False, False]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="5 tokens a row do not fit a cache of 4 places; make it longer"):
        DenseCache.empty(1, 4, 1, 1).write(jnp.ones((1, 5, 1, 1)), jnp.ones((1, 5, 1, 1)), jnp.array([0]))


SIZES = {"vocab_size": 23, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "ffn_size": 12}


def test_a_ring_of_places_is_enough_for_a_window():
    """Seven places, for a window of 4 and four tokens at a time: all logits are those of the full forward pass."""
    config = model_config("mistral", **SIZES, num_kv_heads=2, window=4)
    network = Network(config)
    params = map_leaves(lambda path, leaf: 3 * leaf, network.init(jax.random.key(0)))
    mask = np.arange(12) >= np.array([[0], [2]])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 12)))
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    batch = {"input_ids": ids, "attention_mask": jnp.asarray(mask, jnp.int32), "positions": jnp.asarray(positions)}
    full = forward(config, params, batch)["logits"]
    cache = with_caches(empty_cache(config, params, 2, 12), lambda cache: RingCache.like(cache, 7))
    step = jax.jit(lambda batch, cache: forward(config, params, batch, cache=cache))
    for start in (0, 4, 8):
        piece = {name: a[:, start : start + 4] for name, a in batch.items() if name != "positions"}
        out = step(piece, cache)
        cache, real = out["cache"], mask[:, start : start + 4]
        np.testing.assert_allclose(out["logits"][real], full[:, start : start + 4][real], rtol=1e-4, atol=1e-4)


def with_caches(cache: dict[str, Any], make: Any) -> dict[str, Any]:
    """A model's cache with others in the place of its dense ones."""
    return jax.tree.map(lambda c: make(c) if isinstance(c, Cache) else c, cache, is_leaf=lambda c: isinstance(c, Cache))


@pytest.mark.parametrize("view", ["canonical", "run"])
def test_codes_generate_and_stay_codes(monkeypatch, view):
    """Through prefill, scan over layers and steps; logits are those of the dense cache but for rounding."""
    config = model_config("gpt2", **SIZES, max_positions=16)
    network = Network(config)
    params = map_leaves(lambda path, leaf: 3 * leaf, network.init(jax.random.key(0)))
    params = network.run_view(params) if view == "run" else params
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 6)))

    def logits(cache):
        step = jax.jit(lambda ids, cache: forward(config, params, {"input_ids": ids}, cache=cache))
        first = step(ids[:, :4], cache)
        second = step(ids[:, 4:5], first["cache"])
        return step(ids[:, 5:], second["cache"])

    dense = empty_cache(config, params, 2, 6)
    exact, coded = logits(dense), logits(with_caches(dense, CodesCache.like))
    nodes = jax.tree.leaves(coded["cache"]["layers"], is_leaf=lambda c: isinstance(c, Cache))
    assert {codes.dtype for node in nodes for codes in node.codes} == {jnp.dtype(jnp.int8)}
    difference = np.abs(coded["logits"] - exact["logits"]).max()
    assert 0 < difference < 0.05 * np.abs(exact["logits"]).max()
    monkeypatch.setattr(decoding, "empty_cache", lambda *a, **k: with_caches(empty_cache(*a, **k), CodesCache.like))
    tokens = decoding.generate(config, params, {"input_ids": ids}, jax.random.key(0), new_tokens=3)
    assert tokens.shape == (2, 3)


def test_a_cache_for_another_source_is_refused():
    config = model_config("t5", **SIZES)
    params = Network(config).init(jax.random.key(0))
    batch = {"input_ids": jnp.ones((2, 3), jnp.int32), "decoder_input_ids": jnp.ones((2, 1), jnp.int32)}
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for a cache of \(2, 0\); make it with empty_cache"):
        forward(config, params, batch, cache=empty_cache(config, params, 2, 4))
