"""Gradients in the trainable arrays only, and their exact accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_to_compile import QUICK

from jaxlm.core import Context, Loss, Quantized, Term, describe, dot, dropout, trained_names
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy
from jaxlm.losses.soft_targets import response
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.train.gradient import accumulate, gradient

pytestmark = pytest.mark.slow

ROWS, LENGTH, WIDTH, CLASSES = 12, 5, 6, 7


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"body": {"kernel": normal(0, WIDTH, WIDTH)}, "head": {"kernel": normal(1, WIDTH, CLASSES)}}
NAMES = {"body/kernel", "head/kernel"}
TEACHER = normal(2, WIDTH, CLASSES)


def batch_of():
    """Labels so ragged that one microbatch of three has none at all, and another term's weight is ragged otherwise."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((ROWS, LENGTH)) < 0.4, rng.integers(0, CLASSES, (ROWS, LENGTH)), IGNORED)
    labels[::3] = IGNORED
    return {"x": rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32), "labels": labels.astype(np.int32)}


BATCH = batch_of()


def loss_fn(params, constants, batch, ctx):
    """Cross-entropy per label, distillation per row's tokens, and a penalty per step: three kinds of weight."""
    logits = jnp.tanh(batch["x"] @ params["body"]["kernel"]) @ params["head"]["kernel"]
    tokens = jnp.arange(LENGTH) <= jnp.argmax(batch["labels"], axis=1)[:, None]
    return {
        "cross_entropy": cross_entropy(logits, batch["labels"])._replace(coefficient=0.3),
        "response": response(batch["x"] @ constants["teacher"], logits, tokens)._replace(coefficient=0.7),
        "penalty": Term(jnp.sum(params["body"]["kernel"] ** 2), jnp.float32(1), 0.01),
    }, {"logits": logits}


LOSS = Loss(loss_fn)
CONSTANTS = {"teacher": TEACHER}


@pytest.fixture(scope="module")
def whole():
    return jax.jit(gradient(LOSS, NAMES), compiler_options=QUICK)(PARAMS, CONSTANTS, BATCH, Context())


def test_against_the_formula(whole):
    """`Σ c_i · sum_i / W_i`, differentiated by hand-written jax."""

    def objective(params):
        terms, _ = loss_fn(params, CONSTANTS, BATCH, Context())
        labelled = (BATCH["labels"] != IGNORED).sum()
        tokens = (np.argmax(BATCH["labels"], axis=1) + 1).sum()
        weights = {"cross_entropy": labelled, "response": tokens, "penalty": 1.0}
        return sum(
            {"cross_entropy": 0.3, "response": 0.7, "penalty": 0.01}[n] * terms[n].sum / weights[n] for n in terms
        )

    expected = jax.jit(jax.grad(objective), compiler_options=QUICK)(PARAMS)
    for name in ("body", "head"):
        assert np.allclose(whole[0][f"{name}/kernel"], expected[name]["kernel"], atol=1e-6)


@pytest.mark.parametrize("microbatches", [2, 3, 4, 12])
def test_accumulation_is_exact(whole, microbatches):
    fn = accumulate(gradient(LOSS, NAMES), LOSS, microbatches)
    grads, terms = jax.jit(fn, compiler_options=QUICK)(PARAMS, CONSTANTS, BATCH, Context())
    assert grads.keys() == whole[0].keys()
    for name, value in whole[0].items():
        assert np.abs(grads[name] - value).max() <= 1e-6
    for name, term in whole[1].items():
        # A term per step is counted once a microbatch, in sum and weight alike.
        share = microbatches if name == "penalty" else 1
        assert np.isclose(terms[name].sum / share, term.sum, rtol=1e-6)
        assert terms[name].weight == term.weight * share
        assert terms[name].coefficient == pytest.approx(term.coefficient)


def test_one_microbatch_is_the_gradient_itself():
    fn = gradient(LOSS, NAMES)
    assert accumulate(fn, LOSS, 1) is fn


def test_a_mean_of_means_would_be_caught(whole):
    """The parts' own gradients do not average to the whole's: the data above can tell."""
    parts = [jax.tree.map(lambda a, i=i: a[i::3], BATCH) for i in range(3)]
    one = jax.jit(gradient(LOSS, NAMES), compiler_options=QUICK)
    parts = [one(PARAMS, CONSTANTS, part, Context())[0] for part in parts]
    mean = sum(part["head/kernel"] for part in parts) / 3
    assert np.abs(mean - whole[0]["head/kernel"]).max() > 1e-2


def test_rows_are_dealt_in_turn():
    """Row j goes to part j mod n, so that each part spans all devices."""
    seen = {}

    def fn(params, constants, batch, ctx):
        seen.setdefault(batch["x"].shape, None)
        number = jnp.sum(batch["x"] * params["w"])
        return {"x": Term(number, jnp.sum(batch["mask"]))}, {}

    loss, batch = Loss(fn), {"x": jnp.arange(6.0), "mask": jnp.ones(6)}
    grads, terms = accumulate(gradient(loss, {"w"}), loss, 2)({"w": jnp.ones(3)}, {}, batch, Context())
    assert np.allclose(grads["w"], [(0 + 1) / 6, (2 + 3) / 6, (4 + 5) / 6]) and seen.keys() == {(3,)}
    assert terms["x"].weight == 6


def test_microbatches_draw_their_own_dropout():
    def fn(params, constants, batch, ctx):
        return {"x": Term(jnp.sum(dropout(batch["x"] * params["w"], 0.5, ctx)), jnp.float32(1))}, {}

    ones = jnp.ones((32, 1))  # one weight an entry: its gradient says whether the entry was kept
    loss, batch = Loss(fn), {"x": jnp.ones((64, 1))}
    inner = []
    for i in range(2):
        ctx = Context(key=jax.random.key(0)).at(i)
        inner.append(gradient(loss, {"w"})({"w": ones}, {}, {"x": ones}, ctx)[0]["w"])
    grads, _ = accumulate(gradient(loss, {"w"}), loss, 2)({"w": ones}, {}, batch, Context(key=jax.random.key(0)))
    assert np.allclose(grads["w"], sum(inner) / 2) and not np.array_equal(inner[0], inner[1])


def test_only_what_trains_is_differentiated():
    grads, _ = gradient(LOSS, {"head/kernel"})(PARAMS, CONSTANTS, BATCH, Context())
    assert grads.keys() == {"head/kernel"}


def test_codes_masks_and_buffers_never_train():
    w = LowRank(Quantized.of(normal(0, WIDTH, CLASSES), dynamic=True), normal(1, WIDTH, 2), normal(2, 2, CLASSES))

    def fn(params, constants, batch, ctx):
        return {"ce": cross_entropy(dot(batch["x"], params["kernel"], ctx), batch["labels"])}, {}

    trained = trained_names(describe({"kernel": w}), [lambda info: True])
    grads, _ = gradient(Loss(fn), trained)({"kernel": w}, {}, BATCH, Context())
    assert grads.keys() == {"kernel.a", "kernel.b"}


def test_a_step_without_labels_has_no_gradient():
    empty = {**BATCH, "labels": np.full_like(BATCH["labels"], IGNORED)}
    loss = Loss(lambda p, c, b, ctx: ({"ce": cross_entropy(b["x"] @ p["head"]["kernel"], b["labels"])}, {}))
    grads, terms = gradient(loss, NAMES)(PARAMS, {}, empty, Context())
    assert terms["ce"].weight == 0 and not any(np.asarray(g).any() for g in grads.values())
