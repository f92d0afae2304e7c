"""Tiny models of every family with random biases and norms, and the law: a shrunk model computes what its gates do."""

import functools
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

import jaxlm
from jaxlm.core import Calibration, Gate, SurgeryContext, Term, flatten, map_leaves, unflatten
from jaxlm.io.lm import LM
from jaxlm.methods.prune.structured.gates import close_gates, open_gates
from jaxlm.methods.prune.structured.scores import magnitude_of
from jaxlm.methods.prune.structured.shrink import shrink
from jaxlm.models import model_config
from jaxlm.models.network import Network

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "ffn_size": 12, "num_heads": 4}
MODELS = {
    "MHA": ("gpt2", {"num_layers": 3, "max_positions": 8}),
    "GQA": ("llama", {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4, "qkv_bias": True, "mlp_bias": True}),
    "MQA": ("llama", {"num_kv_heads": 1, "qkv_bias": True, "output_bias": True}),
    "post-norm": ("bert", {"max_positions": 8}),
    "pair": ("bert", {"max_positions": 8, "head": "masked", "next_sentence": True}),
    "classes": ("bert", {"max_positions": 8, "head": "sequence", "labels": ("a", "b", "c")}),
    "T5": ("t5", {"gated": True}),
    "windows": ("mistral", {"num_layers": 3, "num_kv_heads": 2, "window": 3}),
    "late windows": ("qwen2", {"num_layers": 3, "num_kv_heads": 2, "window": 3, "window_from": 1}),
    "shifted positions": ("roberta", {"max_positions": 12, "head": "sequence", "labels": ("a", "b", "c")}),
}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 19, (2, 6)),
    "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
    "decoder_input_ids": np.random.default_rng(1).integers(1, 19, (2, 5)),
}


def change_leaves(lm, change):
    """The model with `change(path, leaf)` in the place of every leaf."""
    return lm.replace(params=map_leaves(change, lm.params))


def set_leaves(lm, leaves):
    """The model with these leaves, by path, in the place of its own."""
    return lm.replace(params=unflatten(flatten(lm.params) | leaves))


@functools.cache
def lm_of(name):
    """A model whose biases and norms are random too."""
    family, fields = MODELS[name]
    noise = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), a.shape)  # noqa: E731
    return change_leaves(LM.initialize(model_config(family, **{**SIZES, **fields}), jax.random.key(0)), noise)


@functools.cache
def _forward(config):
    return jax.jit(Network(config).forward, compiler_options=QUICK)


def batch_of(lm):
    """What the model reads."""
    return {n: BATCH[n] for n in BATCH if n in ("input_ids", "attention_mask") or lm.config.encoder_decoder}


def logits(lm):
    """Logits of real tokens (of the classes, of a classifier)."""
    outputs = _forward(lm.config)(lm.params, batch_of(lm))
    values = np.asarray(outputs["logits"])
    if lm.config.head == "sequence" or lm.config.encoder_decoder:
        return values
    real = values[BATCH["attention_mask"] > 0]
    if "next_sentence_logits" in outputs:
        return np.concatenate([real.reshape(-1), np.asarray(outputs["next_sentence_logits"]).reshape(-1)])
    return real


def random_gates(lm, seed):
    """The model with some entries of every gate closed, and at least one open: another number in every layer."""
    rng = np.random.default_rng(seed)

    def close(path, leaf):
        if not isinstance(leaf, Gate):
            return leaf
        shape = leaf.value.shape
        value = np.zeros(leaf.value.size, np.float32)
        value[rng.permutation(leaf.value.size)[: rng.integers(1, leaf.value.size + (path != "hidden"))]] = 1
        if len(shape) == 3 and shape[0] > 1 and shape[1] > 1:  # equally many query heads in the groups that stay
            value = np.zeros(shape[:2], np.float32)
            left = rng.integers(1, shape[1] + 1)
            for group in rng.permutation(shape[0])[: rng.integers(1, shape[0] + 1)]:
                value[group, rng.permutation(shape[1])[:left]] = 1
        return Gate(jnp.asarray(value).reshape(shape))

    return change_leaves(lm, close)


def closed(lm, kinds, share):
    """The model with gates of the given kinds, closed by magnitude."""
    gated = open_gates(lm, kinds)
    shares = dict.fromkeys(("heads", "ffn", "hidden"), share)
    return gated.replace(params=close_gates(gated.params, magnitude_of(gated.params, gated.axes), shares))


def check_law(gated, tmp_path):
    """Gated and shrunk logits agree, also after saving and reloading; returns the shrunk model."""
    expected = logits(gated)
    small = shrink(gated)
    check_structure(small)
    assert np.abs(expected).max() > 0.2 and np.abs(logits(small) - expected).max() <= 1e-5
    jaxlm.save(small, tmp_path / "model")
    again = jaxlm.load(tmp_path / "model")
    assert again.config == small.config
    assert np.array_equal(logits(again), logits(small))
    return small


def check_structure(lm):
    """The parameters of a model, their shapes and their axis names are those that its config asks for."""
    shapes = lm.network.abstract()
    assert flatten(lm.params).keys() == lm.axes.keys() == flatten(shapes).keys()
    assert lm.axes == lm.network.axes()
    assert jax.tree.map(lambda s: s.shape, shapes) == map_leaves(lambda _, leaf: tuple(leaf.shape), lm.params)


def squares(outputs, batch):
    """A loss of any model: the mean square of its logits."""
    value = outputs["logits"]
    return {"squares": Term(jnp.sum(jnp.square(value)), jnp.float32(value.size))}


def calibration_of(lm, batches=1):
    """Calibration data: batches without the loader's extras."""
    rng = np.random.default_rng(7)
    batch = batch_of(lm)
    draw = lambda: {n: rng.integers(1, 19, v.shape) for n, v in batch.items() if n.endswith("input_ids")}  # noqa: E731
    return Calibration([batch | draw() for _ in range(batches)])


def context_of(calibration):
    """The context of a surgery with these data, and `squares` as the task's loss."""
    return SurgeryContext(read_calibration=lambda lm: calibration, task_loss=squares)


@pytest.fixture(scope="session")
def tools():
    """The functions above, for the test files of this folder."""
    return SimpleNamespace(
        models=MODELS,
        batch=BATCH,
        quick=QUICK,
        change_leaves=change_leaves,
        set_leaves=set_leaves,
        lm_of=lm_of,
        batch_of=batch_of,
        logits=logits,
        random_gates=random_gates,
        closed=closed,
        check_law=check_law,
        check_structure=check_structure,
        calibration_of=calibration_of,
        context_of=context_of,
        squares=squares,
    )
