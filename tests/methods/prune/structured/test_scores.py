"""Scores against their definitions: by hand, by finite differences, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Gate, Quantized, Tap, flatten, map_leaves, materialize, unflatten
from jaxlm.methods.prune.structured.depth import drop_layers
from jaxlm.methods.prune.structured.gates import open_gates, prune
from jaxlm.methods.prune.structured.scores import (
    activation_of,
    block_influence,
    head_scores,
    stream_scores,
    taylor_of,
    unit_scores,
)


def test_head_scores_by_hand(tools):
    own = tools.model_of("GQA")[1]["layers_0"]["attention"]
    query, key, value, output = (np.asarray(own[n]["kernel"], np.float64) for n in ("query", "key", "value", "output"))
    for g in range(4):
        two, one = slice(8 * g, 8 * g + 8), slice(4 * g, 4 * g + 4)
        inwards = (query[:, two] ** 2).sum() + (key[:, one] ** 2).sum() + (value[:, one] ** 2).sum()
        expected = np.sqrt(inwards) * np.linalg.norm(output[two])
        assert np.isclose(head_scores(own, 4, ("query", "key", "value"))[g], expected, rtol=1e-5)


def test_stream_scores_by_hand(tools):
    """Every table row, kernel row or column of the dimension, whatever holds it; vectors do not count."""
    model, params = tools.model_of("post-norm")
    expected = np.zeros(16)
    for path, names in model.axes().items():
        for dimension, name in enumerate(names):
            if len(names) == 2 and name in ("embed", "embed_out", "pooled"):
                expected += (np.asarray(flatten(params)[path], np.float64) ** 2).sum(axis=1 - dimension)
                break
    assert np.allclose(stream_scores(params, model.axes()), np.sqrt(expected), rtol=1e-5)
    coded = map_leaves(lambda path, leaf: Quantized.of(leaf) if "/kernel" in path else leaf, params)
    dense = map_leaves(lambda path, leaf: materialize(leaf), coded)
    assert np.allclose(stream_scores(coded, model.axes()), stream_scores(dense, model.axes()), rtol=1e-5)


@pytest.mark.parametrize("name", ["GQA", "T5", "post-norm"])
def test_taylor_is_the_first_order_change_of_the_loss(name, tools):
    """For one row at a time: |L(1 + h) - L(1 - h)| / 2h, averaged over rows."""
    model, params = tools.model_of(name)
    kinds = ("queries" if name == "GQA" else "heads", "ffn", "hidden", "layers")
    params, _ = open_gates(model, params, model.axes(), kinds)
    data = tools.calibration_of(model)
    scores = taylor_of(model, params, data, tools.squares)
    assert scores.keys() == {path for path, leaf in flatten(params).items() if isinstance(leaf, Gate)}

    @jax.jit
    def losses(path_values):
        gated = unflatten(flatten(params) | {path: Gate(value) for path, value in path_values.items()})
        rows = [{n: v[i : i + 1] for n, v in data.batches[0].items()} for i in range(2)]
        terms = [tools.squares(model.forward(gated, row), row)["squares"] for row in rows]
        return jnp.stack([term.sum / term.weight for term in terms])

    values = {path: leaf.value for path, leaf in flatten(params).items() if isinstance(leaf, Gate)}
    last = f"{'decoder/' if name == 'T5' else ''}layers_1"
    for path in (f"{last}/attention/gate", f"{last}/mlp/gate", "hidden", f"{last}/gate"):
        value, h = values[path], 1e-2
        index = tuple(0 for _ in value.shape) if path.endswith("attention/gate") or not value.shape else (3,)
        up, down = (losses(values | {path: value.at[index].add(sign * h)}) for sign in (1, -1))
        expected = np.abs(np.asarray(up - down) / (2 * h)).mean()
        found = scores[path].reshape(value.shape)[index]
        assert np.isclose(found, expected, rtol=2e-2, atol=2e-3 * float(scores[path].max())), path


def test_activation_is_the_mean_size_of_what_passes(tools):
    """Of the last layer of a model without final gates: read off the product that follows, token by token."""
    model, params = tools.model_of("GQA")
    params, _ = open_gates(model, params, model.axes(), ("queries", "ffn", "hidden"))
    data = tools.calibration_of(model, batches=2)
    scores = activation_of(model, params, data)
    seen = {}

    class Spy(Gate):
        def __call__(self, x, ctx):
            seen["x"] = np.asarray(x)
            return x

    with jax.disable_jit():
        for path, axis in (("layers_1/attention/gate", (0, 3)), ("layers_0/mlp/gate", (0,))):
            total, tokens = 0.0, 0
            for batch in data.batches:
                model.forward(unflatten(flatten(params) | {path: Spy(flatten(params)[path].value)}), batch)
                valid = seen["x"][batch["attention_mask"] > 0]
                total, tokens = total + np.abs(valid).mean(axis=axis[1:]).sum(0), tokens + len(valid)
            assert np.allclose(scores[path], total / tokens, rtol=1e-4), path
        streams = []
        for batch in data.batches:
            taps = model.forward(params, batch, taps=[Tap("hidden", i) for i in range(3)])["taps"]
            streams += [np.abs(np.asarray(x)[batch["attention_mask"] > 0]) for x in taps.values()]
    assert np.allclose(scores["hidden"], np.concatenate(streams).mean(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["T5", "post-norm"])
def test_every_gate_has_an_activation(name, tools):
    model, params = tools.model_of(name)
    params, _ = open_gates(model, params, model.axes(), ("heads", "ffn", "hidden"))
    scores = activation_of(model, params, tools.calibration_of(model))
    assert scores.keys() == {path for path, leaf in flatten(params).items() if isinstance(leaf, Gate)}
    assert all(np.any(np.asarray(s) > 0) and np.all(np.asarray(s) >= 0) for s in scores.values())


def test_what_padding_holds_does_not_count(tools):
    model, params = tools.model_of("post-norm")
    params, _ = open_gates(model, params, model.axes(), ("heads", "ffn", "hidden"))
    one, other = tools.calibration_of(model), tools.calibration_of(model)
    mask = one.batches[0]["attention_mask"]
    other.batches[0]["input_ids"] = np.where(mask, one.batches[0]["input_ids"], 7)
    for a, b in zip(
        jax.tree.leaves(activation_of(model, params, one)),
        jax.tree.leaves(activation_of(model, params, other)),
        strict=True,
    ):
        assert np.allclose(a, b, rtol=1e-5)
    a, b = block_influence(model, params, one), block_influence(model, params, other)
    assert np.allclose([*a.values()], [*b.values()], rtol=1e-5)


def test_unit_scores_read_a_gated_ffn(tools):
    own = tools.model_of("GQA")[1]["layers_0"]["mlp"]
    up, gate, down = (np.asarray(own[n]["kernel"], np.float64) for n in ("up", "gate_proj", "down"))
    expected = np.sqrt((up**2 + gate**2).sum(0) * (down**2).sum(1))
    assert np.allclose(unit_scores(own), expected, rtol=1e-5)


# Layers ---------------------------------------------------------------------------------------------------------------


def identity_layer(params, path):
    """A pre-norm layer that adds nothing."""
    quiet = ("output/kernel", "output/bias", "down/kernel", "down/bias")
    return map_leaves(lambda p, a: a * 0 if p.startswith(path) and p.endswith(quiet) else a, params)


def test_block_influence_of_an_identity_is_zero(tools):
    model, params = tools.model_of("MHA")
    found = block_influence(model, identity_layer(params, "layers_1/"), tools.calibration_of(model))
    assert abs(float(found["layers_1"])) <= 1e-6 < 1e-3 < min(float(found["layers_0"]), float(found["layers_2"]))


def test_block_influence_by_hand(tools):
    model, params = tools.model_of("post-norm")
    data = tools.calibration_of(model)
    taps = [Tap("hidden", i) for i in range(3)]
    x = [np.asarray(model.forward(params, data.batches[0], taps=taps)["taps"][tap], np.float64) for tap in taps]
    valid = data.batches[0]["attention_mask"] > 0
    for i in range(2):
        a, b = x[i][valid], x[i + 1][valid]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert np.isclose(block_influence(model, params, data)[f"layers_{i}"], 1 - cosine.mean(), atol=1e-5)


@pytest.mark.parametrize("score", ["block_influence", "taylor"])
def test_the_layer_that_does_nothing_is_dropped(score, tools):
    model, params = tools.model_of("MHA")
    params = identity_layer(params, "layers_1/")
    small, little, _ = drop_layers(
        model,
        params,
        model.axes(),
        calibration=tools.calibration_of(model),
        share=1 / 3,
        score=score,
        loss=tools.squares,
    )
    assert small.config.num_layers == 2
    assert np.abs(tools.logits(small, little) - tools.logits(model, params)).max() <= 1e-5


def test_both_stacks_of_an_encoder_decoder_lose_layers(tools):
    model, params = tools.model_of("T5")
    small, little, _ = drop_layers(model, params, model.axes(), calibration=tools.calibration_of(model), share=0.5)
    assert (small.config.num_layers, small.config.num_decoder_layers) == (1, 1)
    assert np.isfinite(tools.logits(small, little)).all()


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_units_without_effect_go(score, tools):
    """Three units of each layer are silenced: by data they are found, and cutting them changes nothing."""
    model, params = tools.model_of("MHA")
    quiet = jnp.array([1, 5, 7])
    silence = lambda path, a: a.at[..., quiet].set(0.0) if "/mlp/up/" in path else a  # noqa: E731
    params = map_leaves(silence, params)
    data = tools.calibration_of(model)
    small, little, _ = prune(
        model, params, model.axes(), calibrate=lambda: data, loss=tools.squares, ffn=0.25, score=score
    )
    assert set(small.config.ffn_size) == {9}
    assert np.abs(tools.logits(small, little) - tools.logits(model, params)).max() <= 1e-5


def test_without_data_there_is_no_score(tools):
    model, params = tools.model_of("MHA")
    with pytest.raises(ValueError, match=r"'block_influence' reads data: set config\.calibration"):
        drop_layers(model, params, model.axes(), share=0.5)
    with pytest.raises(ValueError, match="calibration has no batches"):
        drop_layers(model, params, model.axes(), calibration=tools.calibration_of(model, batches=0), share=0.5)


def test_scores_that_are_no_numbers_are_refused_by_name(tools):
    """Calibration without a single token that counts has no mean."""
    model, params = tools.model_of("MHA")
    data = tools.calibration_of(model)
    for batch in data.batches:
        batch["attention_mask"] = np.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match=r"'activation' is no number at layers_0/mlp/gate.*config.calibration"):
        prune(model, params, model.axes(), calibrate=lambda: data, ffn=0.5, score="activation")
