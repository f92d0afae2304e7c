"""Lessons of real networks: nothing to learn from oneself, no influence of padding, exact accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Loss, arrays
from jaxlm.losses.cross_entropy import cross_entropy
from jaxlm.methods.distill.method import distill
from jaxlm.methods.distill.teacher import Lesson, Teacher
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.train.gradient import accumulate, gradient

# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SIZES = {"vocab_size": 19, "num_layers": 2, "hidden_size": 16, "ffn_size": 12}
MODELS = {
    "bert": Network(model_config("bert", **SIZES, num_heads=4, max_positions=8)),
    "llama": Network(model_config("llama", **SIZES, num_heads=4, num_kv_heads=2)),
}
TEACHER = Network(model_config("gpt2", **{**SIZES, "num_layers": 3, "hidden_size": 24}, num_heads=2, max_positions=8))
EVERYTHING = {"hidden": 1.0, "attention": 1.0, "relations": 1.0, "relation_heads": 2}


def lesson_of(model, seed, **options):
    forward = lambda params, batch, taps: model.forward(params, batch, taps=taps)  # noqa: E731
    params = model.run_view(model.init(jax.random.key(seed)))
    if model is TEACHER:  # which is sure of what it says: a divergence of almost equal answers is all rounding
        params = jax.tree.map(lambda a: 6 * a, params)
    config = model.config
    return Lesson(Teacher(forward, params, config.num_layers, config.hidden_size), **{**EVERYTHING, **options})


def batch_of(length=6):
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.array([[6], [2], [5], [3]])).astype(np.int32)
    ids = np.where(mask, rng.integers(1, 19, (4, 1)) + np.arange(length) % 3, 0).astype(np.int32)
    labels = np.where(mask & (np.arange(length) % 4 != 1), ids, -100).astype(np.int32)
    labels[1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weight": np.float32([1.0, np.nan, 0.5, 2.0])}


def built(model, method):
    """The loss, and parameters in the run view."""
    params = method.init(jax.random.key(2), model, model.init(jax.random.key(0)), model.axes()).params

    def base(taps):
        def fn(params, constants, batch, ctx):
            outputs = model.forward(params, batch, ctx=ctx, taps=taps)
            return {"cross_entropy": cross_entropy(outputs["logits"], batch["labels"])}, outputs

        return Loss(fn, taps)

    return method.loss(base(method.loss(base(frozenset())).taps)), model.run_view(params)


@functools.cache
def terms_and_gradient(family, own, length=6, microbatches=1):
    model = MODELS[family]
    lesson = lesson_of(model, 0) if own else lesson_of(TEACHER, 1, sample_weight="weight")
    loss, params = built(model, distill([lesson], alpha=0.7))
    fn = jax.jit(accumulate(gradient(loss, []), loss, microbatches), compiler_options=QUICK)
    return jax.device_get(fn(params, {"teachers": (lesson.teacher.params,)}, batch_of(length), Context()))[::-1]


@pytest.mark.parametrize("family", MODELS)
def test_nothing_to_learn_from_oneself(family):
    terms, _ = terms_and_gradient(family, own=True)
    learned = {name: term for name, term in terms.items() if name != "cross_entropy"}
    assert {name.partition("_")[0] for name in learned} == {"response", "hidden", "attention", "query", "key", "value"}
    for name, term in learned.items():
        assert abs(term.sum) < 1e-5 and term.weight > 0, name


def test_longer_padding_changes_nothing():
    short, long = (terms_and_gradient("llama", own=False, length=length) for length in (6, 8))
    for name, term in short[0].items():
        assert np.isclose(term.sum, long[0][name].sum, rtol=1e-4, atol=1e-6) and term.weight == long[0][name].weight, (
            name
        )
        assert term.sum > 1e-4 and np.isfinite(term.sum)
    for name, value in arrays(short[1]).items():
        assert np.allclose(value, long[1][name], atol=1e-5), name


def test_accumulation_is_exact():
    """Also with weights of samples, on rows of unequal length of which one teaches nothing."""
    whole, parts = (terms_and_gradient("llama", own=False, microbatches=n) for n in (1, 2))
    for name, term in whole[0].items():
        assert np.isclose(term.sum, parts[0][name].sum, rtol=1e-5) and np.isclose(term.weight, parts[0][name].weight)
    for name, value in whole[1].items():
        assert np.abs(value - parts[1][name]).max() <= 2e-6 * max(1, np.abs(value).max()), name


def test_only_what_is_tapped_leaves_the_scan():
    """Lessons on one layer of six: no array over all layers but the parameters' own gradients."""
    deep = Network(
        MODELS["bert"].config.replace(num_layers=6, num_heads=(4,) * 6, num_kv_heads=(4,) * 6, ffn_size=(12,) * 6)
    )
    from jaxlm.runner.sharded_step import tap_breaks

    lesson = lesson_of(MODELS["bert"], 0, hidden=0.0, attention=0.0)
    taps = lesson.plan(6).taps(side=0)
    view = deep.run_view(deep.abstract(), breaks=tap_breaks(taps, deep))
    assert {key for key in view if key.startswith("layers_")} == {"layers_0-4", "layers_5-5"}
    batch = {name: jnp.asarray(value) for name, value in batch_of().items()}
    jaxpr = str(jax.make_jaxpr(lambda p: deep.forward(p, batch, taps=taps)["taps"])(view))
    assert "f32[5,4,6,4,4]" not in jaxpr and "f32[1,4,6,4,4]" in jaxpr
