"""Scores against their definitions: by hand, by finite differences, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Gate, NoData, Quantized, SurgeryContext, Tap, flatten, materialize, unflatten
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

pytestmark = pytest.mark.slow


def test_head_scores_by_hand(tools):
    module = tools.lm_of("GQA").params["layers_0"]["attention"]
    query, key, value, output = (
        np.asarray(module[n]["kernel"], np.float64) for n in ("query", "key", "value", "output")
    )
    for g in range(4):
        two, one = slice(8 * g, 8 * g + 8), slice(4 * g, 4 * g + 4)
        inwards = (query[:, two] ** 2).sum() + (key[:, one] ** 2).sum() + (value[:, one] ** 2).sum()
        expected = np.sqrt(inwards) * np.linalg.norm(output[two])
        assert np.isclose(head_scores(module, 4, ("query", "key", "value"))[g], expected, rtol=1e-5)


def test_stream_scores_by_hand(tools):
    """Every table row, kernel row or column of the dimension, whatever holds it; vectors do not count."""
    lm = tools.lm_of("post-norm")
    expected = np.zeros(16)
    for path, names in lm.axes.items():
        for dimension, name in enumerate(names):
            if len(names) == 2 and name in ("embed", "embed_out", "pooled"):
                expected += (np.asarray(flatten(lm.params)[path], np.float64) ** 2).sum(axis=1 - dimension)
                break
    assert np.allclose(stream_scores(lm.params, lm.axes), np.sqrt(expected), rtol=1e-5)
    coded = tools.change_leaves(lm, lambda path, leaf: Quantized.of(leaf) if "/kernel" in path else leaf)
    dense = tools.change_leaves(coded, lambda path, leaf: materialize(leaf))
    assert np.allclose(stream_scores(coded.params, lm.axes), stream_scores(dense.params, lm.axes), rtol=1e-5)


@pytest.mark.parametrize("name", ["GQA", "T5", "post-norm"])
def test_taylor_is_the_first_order_change_of_the_loss(name, tools):
    """For one row at a time: |L(1 + h) - L(1 - h)| / 2h, averaged over rows."""
    gated = open_gates(tools.lm_of(name), ("queries" if name == "GQA" else "heads", "ffn", "hidden", "layers"))
    calibration = tools.calibration_of(gated)
    scores = taylor_of(gated, tools.context_of(calibration))
    values = {path: leaf.value for path, leaf in flatten(gated.params).items() if isinstance(leaf, Gate)}
    assert scores.keys() == values.keys()

    @jax.jit
    def losses(values):
        params = unflatten(flatten(gated.params) | {path: Gate(value) for path, value in values.items()})
        rows = [{n: v[i : i + 1] for n, v in calibration.batches[0].items()} for i in range(2)]
        terms = [tools.squares(gated.network.forward(params, row), row)["squares"] for row in rows]
        return jnp.stack([term.sum / term.weight for term in terms])

    last = f"{'decoder/' if name == 'T5' else ''}layers_1"
    for path in (f"{last}/attention/gate", f"{last}/mlp/gate", "hidden", f"{last}/gate"):
        value, h = values[path], 1e-2
        index = tuple(0 for _ in value.shape) if path.endswith("attention/gate") or not value.shape else (3,)
        up, down = (losses(values | {path: value.at[index].add(sign * h)}) for sign in (1, -1))
        expected = np.abs(np.asarray(up - down) / (2 * h)).mean()
        score = scores[path].reshape(value.shape)[index]
        assert np.isclose(score, expected, rtol=2e-2, atol=2e-3 * float(scores[path].max())), path


def test_activation_is_the_mean_size_of_what_passes(tools):
    """Of the last layer of a model without final gates: read off the product that follows, token by token."""
    gated = open_gates(tools.lm_of("GQA"), ("queries", "ffn", "hidden"))
    calibration = tools.calibration_of(gated, batches=2)
    scores = activation_of(gated, tools.context_of(calibration))
    seen = {}

    class Spy(Gate):
        def __call__(self, x, ctx):
            seen["x"] = np.asarray(x)
            return x

    with jax.disable_jit():
        for path, axis in (("layers_1/attention/gate", (0, 3)), ("layers_0/mlp/gate", (0,))):
            watched = tools.set_leaves(gated, {path: Spy(flatten(gated.params)[path].value)})
            total, tokens = 0.0, 0
            for batch in calibration.batches:
                watched.network.forward(watched.params, batch)
                valid = seen["x"][batch["attention_mask"] > 0]
                total, tokens = total + np.abs(valid).mean(axis=axis[1:]).sum(0), tokens + len(valid)
            assert np.allclose(scores[path], total / tokens, rtol=1e-4), path
        streams = []
        for batch in calibration.batches:
            taps = gated.network.forward(gated.params, batch, taps=[Tap("hidden", i) for i in range(3)])["taps"]
            streams += [np.abs(np.asarray(x)[batch["attention_mask"] > 0]) for x in taps.values()]
    assert np.allclose(scores["hidden"], np.concatenate(streams).mean(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["T5", "post-norm"])
def test_every_gate_has_an_activation(name, tools):
    gated = open_gates(tools.lm_of(name), ("heads", "ffn", "hidden"))
    scores = activation_of(gated, tools.context_of(tools.calibration_of(gated)))
    assert scores.keys() == {path for path, leaf in flatten(gated.params).items() if isinstance(leaf, Gate)}
    assert all(np.any(np.asarray(s) > 0) and np.all(np.asarray(s) >= 0) for s in scores.values())


def test_what_padding_holds_does_not_count(tools):
    gated = open_gates(tools.lm_of("post-norm"), ("heads", "ffn", "hidden"))
    one, other = tools.calibration_of(gated), tools.calibration_of(gated)
    mask = one.batches[0]["attention_mask"]
    other.batches[0]["input_ids"] = np.where(mask, one.batches[0]["input_ids"], 7)
    contexts = tools.context_of(one), tools.context_of(other)
    for a, b in zip(*(jax.tree.leaves(activation_of(gated, context)) for context in contexts), strict=True):
        assert np.allclose(a, b, rtol=1e-5)
    a, b = (block_influence(gated, context) for context in contexts)
    assert np.allclose([*a.values()], [*b.values()], rtol=1e-5)


def test_unit_scores_read_a_gated_ffn(tools):
    module = tools.lm_of("GQA").params["layers_0"]["mlp"]
    up, gate, down = (np.asarray(module[n]["kernel"], np.float64) for n in ("up", "gate_proj", "down"))
    expected = np.sqrt((up**2 + gate**2).sum(0) * (down**2).sum(1))
    assert np.allclose(unit_scores(module), expected, rtol=1e-5)


# Layers ---------------------------------------------------------------------------------------------------------------


def with_identity_layer(tools, path):
    """A pre-norm model in which one layer adds nothing."""
    silent = ("output/kernel", "output/bias", "down/kernel", "down/bias")
    silence = lambda p, a: a * 0 if p.startswith(f"{path}/") and p.endswith(silent) else a  # noqa: E731
    return tools.change_leaves(tools.lm_of("MHA"), silence)


def test_block_influence_of_an_identity_is_zero(tools):
    lm = with_identity_layer(tools, "layers_1")
    scores = block_influence(lm, tools.context_of(tools.calibration_of(lm)))
    assert abs(float(scores["layers_1"])) <= 1e-6 < 1e-3 < min(float(scores["layers_0"]), float(scores["layers_2"]))


def test_block_influence_by_hand(tools):
    lm = tools.lm_of("post-norm")
    calibration = tools.calibration_of(lm)
    [batch] = calibration.batches
    taps = [Tap("hidden", i) for i in range(3)]
    tapped = lm.network.forward(lm.params, batch, taps=taps)["taps"]
    x = [np.asarray(tapped[tap], np.float64) for tap in taps]
    valid = batch["attention_mask"] > 0
    scores = block_influence(lm, tools.context_of(calibration))
    for i in range(2):
        a, b = x[i][valid], x[i + 1][valid]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert np.isclose(scores[f"layers_{i}"], 1 - cosine.mean(), atol=1e-5)


@pytest.mark.parametrize("score", ["block_influence", "taylor"])
def test_the_layer_that_does_nothing_is_dropped(score, tools):
    lm = with_identity_layer(tools, "layers_1")
    small = drop_layers(lm, tools.context_of(tools.calibration_of(lm)), share=1 / 3, score=score)
    assert small.config.num_layers == 2
    assert np.abs(tools.logits(small) - tools.logits(lm)).max() <= 1e-5


def test_both_stacks_of_an_encoder_decoder_lose_layers(tools):
    lm = tools.lm_of("T5")
    small = drop_layers(lm, tools.context_of(tools.calibration_of(lm)), share=0.5)
    assert (small.config.num_layers, small.config.num_decoder_layers) == (1, 1)
    assert np.isfinite(tools.logits(small)).all()


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_units_without_effect_go(score, tools):
    """Three units of each layer are silenced: by data they are found, and cutting them changes nothing."""
    units = jnp.array([1, 5, 7])
    silence = lambda path, a: a.at[..., units].set(0.0) if "/mlp/up/" in path else a  # noqa: E731
    lm = tools.change_leaves(tools.lm_of("MHA"), silence)
    small = prune(lm, tools.context_of(tools.calibration_of(lm)), ffn=0.25, score=score)
    assert set(small.config.ffn_size) == {9}
    assert np.abs(tools.logits(small) - tools.logits(lm)).max() <= 1e-5


def test_without_data_there_is_no_score(tools):
    lm = tools.lm_of("MHA")
    for score in ("block_influence", "taylor"):
        with pytest.raises(NoData, match=r"it reads calibration data: set config\.calibration"):
            drop_layers(lm, SurgeryContext(task_loss=tools.squares), share=0.5, score=score)
    with pytest.raises(NoData, match="it reads the loss of a task"):
        drop_layers(lm, share=0.5, score="taylor")
    with pytest.raises(ValueError, match="calibration has no batches"):
        drop_layers(lm, tools.context_of(tools.calibration_of(lm, batches=0)), share=0.5)


def test_scores_that_are_no_numbers_are_refused_by_name(tools):
    """Calibration without a single token that counts has no mean."""
    lm = tools.lm_of("MHA")
    calibration = tools.calibration_of(lm)
    for batch in calibration.batches:
        batch["attention_mask"] = np.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match=r"'activation' is no number at layers_0/mlp/gate.*config.calibration"):
        prune(lm, tools.context_of(calibration), ffn=0.5, score="activation")
