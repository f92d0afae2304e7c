"""Distillation between real networks: nothing to learn from oneself, no influence of padding, exact accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

from jaxlm.core import Context, Loss, arrays
from jaxlm.io.lm import LM
from jaxlm.losses.cross_entropy import cross_entropy
from jaxlm.methods.distill.method import distill
from jaxlm.methods.distill.teacher import DistillConfig, Teacher
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.train.gradient import accumulate, gradient

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 19, "num_layers": 2, "hidden_size": 16, "ffn_size": 12}
STUDENTS = {
    "bert": model_config("bert", **SIZES, num_heads=4, max_positions=8),
    "llama": model_config("llama", **SIZES, num_heads=4, num_kv_heads=2),
}
DEEPER = model_config("gpt2", **{**SIZES, "num_layers": 3, "hidden_size": 24}, num_heads=2, max_positions=8)
EVERYTHING = {"hidden": 1.0, "attention": 1.0, "relations": 1.0, "relation_heads": 2}


@functools.cache
def student(family):
    return LM.initialize(STUDENTS[family], jax.random.key(0))


@functools.cache
def deeper_teacher():
    """Another model, sure of what it says: a divergence of almost equal answers is nothing but float error."""
    lm = LM.initialize(DEEPER, jax.random.key(1))
    return lm.replace(params=jax.tree.map(lambda a: 6 * a, lm.params))


def config_of(teacher, **options):
    """Everything that can be learned from a model."""
    network, sizes = teacher.network, teacher.config
    forward = lambda params, batch, taps: network.forward(params, batch, taps=taps)  # noqa: E731
    params = network.run_view(teacher.params)
    return DistillConfig(Teacher(forward, params, sizes.num_layers, sizes.hidden_size), **{**EVERYTHING, **options})


def batch_of(length=6):
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.array([[6], [2], [5], [3]])).astype(np.int32)
    ids = np.where(mask, rng.integers(1, 19, (4, 1)) + np.arange(length) % 3, 0).astype(np.int32)
    labels = np.where(mask & (np.arange(length) % 4 != 1), ids, -100).astype(np.int32)
    labels[1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weight": np.float32([1.0, np.nan, 0.5, 2.0])}


def loss_and_params(lm, method):
    """The loss, and parameters in the run view."""
    network = lm.network
    params = method.init(jax.random.key(2), lm).lm.params

    def base(taps):
        def fn(params, constants, batch, ctx):
            outputs = network.forward(params, batch, ctx=ctx, taps=taps)
            return {"cross_entropy": cross_entropy(outputs["logits"], batch["labels"])}, outputs

        return Loss(fn, taps)

    return method.loss(base(method.loss(base(frozenset())).taps)), network.run_view(params)


@functools.cache
def terms_and_gradient(family, of_itself, length=6, microbatches=1):
    lm = student(family)
    config = config_of(lm) if of_itself else config_of(deeper_teacher(), sample_weight="weight")
    loss, params = loss_and_params(lm, distill([config], alpha=0.7))
    fn = jax.jit(accumulate(gradient(loss, arrays(params)), loss, microbatches), compiler_options=QUICK)
    return jax.device_get(fn(params, {"teachers": (config.teacher.params,)}, batch_of(length), Context()))[::-1]


@pytest.mark.parametrize("family", STUDENTS)
def test_nothing_to_learn_from_oneself(family):
    terms, _ = terms_and_gradient(family, of_itself=True)
    learned = {name: term for name, term in terms.items() if name != "cross_entropy"}
    assert {name.partition("_")[0] for name in learned} == {"response", "hidden", "attention", "query", "key", "value"}
    for name, term in learned.items():
        assert abs(term.sum) < 1e-5 and term.weight > 0, name


@pytest.mark.full
def test_longer_padding_changes_nothing():
    short, long = (terms_and_gradient("llama", of_itself=False, length=length) for length in (6, 8))
    for name, term in short[0].items():
        assert np.isclose(term.sum, long[0][name].sum, rtol=1e-4, atol=1e-6) and term.weight == long[0][name].weight, (
            name
        )
        assert term.sum > 1e-4 and np.isfinite(term.sum)
    for name, value in arrays(short[1]).items():
        assert np.allclose(value, long[1][name], atol=1e-5), name


def test_accumulation_is_exact():
    """Also with weights of samples, on rows of unequal length of which one teaches nothing."""
    whole, parts = (terms_and_gradient("llama", of_itself=False, microbatches=n) for n in (1, 2))
    for name, term in whole[0].items():
        assert np.isclose(term.sum, parts[0][name].sum, rtol=1e-5) and np.isclose(term.weight, parts[0][name].weight)
    for name, value in whole[1].items():
        assert np.abs(value - parts[1][name]).max() <= 2e-6 * max(1, np.abs(value).max()), name


def test_only_what_is_tapped_leaves_the_scan():
    """One layer of six is compared: no array over all layers but the parameters' own gradients."""
    shallow = STUDENTS["bert"]
    deep = Network(shallow.replace(num_layers=6, num_heads=(4,) * 6, num_kv_heads=(4,) * 6, ffn_size=(12,) * 6))
    taps = config_of(student("bert"), hidden=0.0, attention=0.0).pairing(6).taps(side=0)
    view = deep.run_view(deep.abstract(), breaks=deep.tap_breaks(taps))
    assert {key for key in view if key.startswith("layers_")} == {"layers_0-4", "layers_5-5"}
    batch = {name: jnp.asarray(value) for name, value in batch_of().items()}
    jaxpr = str(jax.make_jaxpr(lambda p: deep.forward(p, batch, taps=taps)["taps"])(view))
    assert "f32[5,4,6,4,4]" not in jaxpr and "f32[1,4,6,4,4]" in jaxpr
