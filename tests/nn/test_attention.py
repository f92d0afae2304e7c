"""Attention with a prefix and added scores, against loops over rows, heads, queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Prefix, Tokens, initialize
from jaxlm.nn.attention import attention, attention_spec
from jaxlm.nn.layer import Layer, Rotary
from jaxlm.nn.position import rotate

pytestmark = pytest.mark.slow

ROWS, LENGTH, SOURCE, HEAD = 2, 5, 4, 4
BASE = Layer(hidden=16, kv_heads=2, q_per_kv=2, head_dim=HEAD, ffn=8, cross_heads=4)
LAYERS = {
    "causal": (BASE, False),
    "rotary and window": (Layer(**{**vars(BASE), "rotary": Rotary(50.0), "window": 3, "scale_scores": False}), False),
    "both sides": (Layer(**{**vars(BASE), "causal": False}), False),
    "cross": (BASE, True),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def by_hand(q, k, v, prefix, bias, sees):
    """Softmax over the prefix, which all see, and over the keys that `sees(row, query, key)` lets through."""
    rows, queries, heads, _ = q.shape
    group = heads // k.shape[2]
    out, probabilities = np.zeros(q.shape), np.zeros((rows, heads, queries, k.shape[1]))
    for r, h, i in np.ndindex(rows, heads, queries):
        before = prefix.shape[2]
        seen = [j for j in range(k.shape[1]) if sees(r, i, j)]
        keys = np.concatenate([prefix[0, r % prefix.shape[1], :, h // group], k[r, seen, h // group]])
        values = np.concatenate([prefix[1, r % prefix.shape[1], :, h // group], v[r, seen, h // group]])
        weights = keys @ q[r, i, h]
        weights[before:] += bias[r, h, i, seen]
        weights = np.exp(weights - weights.max(initial=-1e9))  # padding sees nothing
        weights /= weights.sum()
        out[r, i, h], probabilities[r, h, i, seen] = weights @ values, weights[before:]
    return out, probabilities


@pytest.mark.parametrize("given", ["a prefix a row", "one prefix", "scores alone"])
@pytest.mark.parametrize("shared", ["no bias", "relative bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_prefix_and_added_scores(name, shared, given):
    layer, cross = LAYERS[name]
    keys_length, kv_heads, heads = (SOURCE, 4, 4) if cross else (LENGTH, layer.kv_heads, layer.heads)
    params = initialize(jax.random.key(0), attention_spec(layer, 0.3, cross))
    params = jax.tree.map(lambda a: a + 0.2 * normal(a.size, *a.shape), params)
    x, source = normal(1, ROWS, LENGTH, 16), normal(2, ROWS, SOURCE, 16)
    number = {"a prefix a row": (ROWS, 3), "one prefix": (1, 3), "scores alone": (1, 0)}[given]
    prefix = normal(3, 2, *number, kv_heads, HEAD)
    added, bias = normal(4, ROWS, heads, LENGTH, keys_length), normal(5, 1, heads, LENGTH, keys_length)
    bias = bias if shared == "relative bias" else None
    calls = []

    def scores(queries, keys, ctx):
        calls.append((queries.order, keys.segments))
        return added

    sites = {"attention_scores": scores}
    if number[1]:
        sites["kv_prefix"] = lambda ctx: Prefix(*prefix)

    def tokens(length):
        order = jnp.arange(length)
        segments = jnp.where(order < jnp.array([[length], [length - 1]]), 1, 0)
        return Tokens(segments, order, jnp.broadcast_to(order, (ROWS, length)))

    queries, keys = tokens(LENGTH), tokens(keys_length)
    options = {"ctx": Context(), "bias": bias, "cross": cross, "taps": ("attention",)}
    options["source"] = source if cross else None
    result = attention(params | sites, x, layer, queries, keys, **options)
    assert len(calls) == 1 and np.array_equal(calls[0][1], keys.segments)

    def project(name, h, count):
        dense = params[name]
        return np.asarray(h @ dense["kernel"] + dense["bias"]).reshape(*h.shape[:2], count, HEAD)

    inputs = source if cross else x
    q, k, v = project("query", x, heads), project("key", inputs, kv_heads), project("value", inputs, kv_heads)
    if layer.rotary and not cross:
        q, k = (np.asarray(rotate(jnp.asarray(a), queries.positions, layer.rotary)) for a in (q, k))
    q = q * HEAD**-0.5 if layer.scale_scores else q

    def sees(row, i, j):
        real = queries.segments[row, i] == keys.segments[row, j] == 1
        past = cross or not layer.causal or j <= i
        return bool(real) and past and (layer.window is None or abs(i - j) < layer.window)

    total = np.asarray(added + (0 if bias is None else bias))
    real = np.asarray(queries.segments) > 0
    out, probabilities = by_hand(q, k, v, np.asarray(prefix), total, lambda r, i, j: real[r, i] and sees(r, i, j))
    expected = out.reshape(ROWS, LENGTH, -1) @ np.asarray(params["output"]["kernel"]) + params["output"]["bias"]
    np.testing.assert_allclose(result.output[real], expected[real], rtol=1e-4, atol=1e-5)
    tapped = np.moveaxis(np.asarray(result.taps["attention"]), 1, 2)[real]
    np.testing.assert_allclose(tapped, np.moveaxis(probabilities, 1, 2)[real], rtol=1e-4, atol=1e-5)
