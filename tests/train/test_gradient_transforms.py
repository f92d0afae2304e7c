"""Transforms of the gradient inside accumulation and outside it, gradients in columns, and losses that couple rows.

FreeLB and A-GEM are small here: they hold the sockets that their kind plugs into.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core import Context, Loss, Method, MethodInit, Term, chain, describe
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.io.lm import LM
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy
from jaxlm.models import model_config
from jaxlm.parallel import make_mesh
from jaxlm.train.checkpointing import flatten, unflatten
from jaxlm.train.gradient import accumulate, gradient, step_gradient
from jaxlm.train.optimizer import optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import create_state, dropout_key, make_step

pytestmark = pytest.mark.slow

ROWS, LENGTH, WIDTH, CLASSES = 16, 3, 8, 4
PERTURBATION = "rows/perturbation"


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"body": {"kernel": normal(0, WIDTH, WIDTH)}, "head": {"kernel": normal(1, WIDTH, CLASSES)}}
NAMES = frozenset({"body/kernel", "head/kernel"})


def logits_of(params, batch):
    x = batch["x"] + batch.get(PERTURBATION, 0.0)
    return jnp.tanh(x @ params["body"]["kernel"]) @ params["head"]["kernel"]


def loss_fn(params, constants, batch, ctx):
    return {"ce": cross_entropy(logits_of(params, batch), batch["labels"])}, {}


LOSS = Loss(loss_fn)


def batches():
    """A batch, and a memory that half of its microbatches disagree with: it has what the model would answer by itself.

    Labels are so ragged that microbatches weigh differently, and some rows have none.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    answers = np.asarray(logits_of(PARAMS, {"x": x}).argmax(-1))
    labels = rng.integers(0, CLASSES, (ROWS, LENGTH))
    labels[1::2] = answers[1::2]
    absent = rng.random((ROWS, LENGTH)) < 0.5
    absent[::5] = True
    batch, memory = (jnp.asarray(np.where(absent, IGNORED, a), jnp.int32) for a in (labels, answers))
    return {"x": x, "labels": batch}, {"x": x, "labels": memory}


BATCH, MEMORY = batches()
CONSTANTS = {"memory": MEMORY}


def climbed(perturbation, slope, rate, radius):
    """One step up of every row's perturbation, and back into its ball."""
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True))  # noqa: E731
    moved = perturbation + rate * slope / jnp.maximum(norm(slope), 1e-9)
    return moved * jnp.minimum(1.0, radius / jnp.maximum(norm(moved), 1e-9))


def freelb(steps=3, rate=0.5, radius=1.0, noise=0.0) -> Method:
    """The gradient at every step of a climb in the inputs, averaged; the terms are those of the first."""

    def microbatch_grad(inner):
        def fn(params, constants, batch, ctx, weights=None):
            perturbation = noise * jax.random.normal(ctx.at("freelb").key, batch["x"].shape) if noise else 0.0
            perturbation = jnp.zeros(batch["x"].shape) + perturbation
            by_step = []
            for _ in range(steps):
                grads, terms = inner(params, constants, {**batch, PERTURBATION: perturbation}, ctx, weights)
                perturbation = climbed(perturbation, grads.pop(PERTURBATION), rate, radius)
                by_step.append((grads, terms))
            mean = jax.tree.map(lambda *g: sum(g) / steps, *(grads for grads, _ in by_step))
            return mean, by_step[0][1]

        return fn

    return Method(microbatch_grad=microbatch_grad, grad_columns=frozenset({PERTURBATION}))


def projected(grads, memory):
    """Where the two disagree, the gradient without its part along that of the memory."""
    product = sum(jnp.vdot(grads[name], memory[name]) for name in grads)
    square = sum(jnp.vdot(g, g) for g in memory.values())
    return {name: g - jnp.minimum(product, 0.0) / square * memory[name] for name, g in grads.items()}


def against_memory(inner):
    def fn(params, constants, batch, ctx, weights=None):
        grads, terms = inner(params, constants, batch, ctx, weights)
        return projected(grads, inner(params, constants, constants["memory"], ctx)[0]), terms

    return fn


AGEM = Method(grad=against_memory)


def objective(params, batch):
    """Cross-entropy as one would write it, over all labels of the batch."""
    mask = batch["labels"] != IGNORED
    likelihood = jax.nn.log_softmax(logits_of(params, batch))
    chosen = jnp.take_along_axis(likelihood, jnp.where(mask, batch["labels"], 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, chosen, 0.0)) / mask.sum()


def by_name(tree):
    return {f"{key}/kernel": value["kernel"] for key, value in tree.items()}


def close(grads, expected, atol=1e-6):
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(grads[name], value, rtol=1e-5, atol=atol, err_msg=name)


def computed(method, microbatches, loss=LOSS):
    return jax.jit(step_gradient(method, loss, NAMES, microbatches))(PARAMS, CONSTANTS, BATCH, Context())


# Inside and outside ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_inside_accumulation(microbatches):
    """However the batch is cut, every row climbs by itself and counts as in the whole step."""
    perturbation, expected = jnp.zeros(BATCH["x"].shape), []
    for _ in range(3):
        at = lambda params, x: objective(params, {**BATCH, PERTURBATION: x})  # noqa: E731
        of_params, slope = jax.grad(at, (0, 1))(PARAMS, perturbation)
        perturbation = climbed(perturbation, slope, 0.5, 1.0)
        expected.append(by_name(of_params))
    grads, terms = computed(freelb(), microbatches)
    close(grads, {name: sum(g[name] for g in expected) / 3 for name in NAMES})
    assert np.abs(grads["body/kernel"] - expected[0]["body/kernel"]).max() > 1e-2, "it climbed nowhere"
    assert np.isclose(terms["ce"].mean, objective(PARAMS, BATCH), rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_outside_accumulation(microbatches):
    """The gradient of the whole step is projected, not that of a microbatch."""
    whole, memory = (by_name(jax.grad(objective)(PARAMS, batch)) for batch in (BATCH, MEMORY))
    expected = projected(whole, memory)
    assert np.abs(expected["head/kernel"] - whole["head/kernel"]).max() > 1e-3, "they agree, so nothing is tested"
    close(computed(AGEM, microbatches)[0], expected)
    of_parts, _ = computed(Method(microbatch_grad=against_memory), microbatches)
    difference = max(float(np.abs(of_parts[name] - expected[name]).max()) for name in NAMES)
    assert difference <= 1e-6 if microbatches == 1 else difference > 1e-3


@pytest.mark.parametrize(("field", "added"), [("grad", 1), ("microbatch_grad", 2)])
def test_a_chain_applies_both_in_order(field, added):
    """Twice the gradient and one more; inside, one more a microbatch."""

    def changed(change):
        def transform(inner):
            def fn(*arguments):
                grads, terms = inner(*arguments)
                return jax.tree.map(change, grads), terms

            return fn

        return Method(**{field: transform})

    double, increase = changed(lambda g: 2 * g), changed(lambda g: g + 1)
    plain, _ = computed(Method(), 1)
    for methods, expected in (((double, increase), (2, added)), ((increase, double), (2, 2 * added))):
        both = chain([(str(number), method) for number, method in enumerate(methods)])
        close(computed(both, 2)[0], {name: expected[0] * g + expected[1] for name, g in plain.items()})


# Steps ----------------------------------------------------------------------------------------------------------------


def stepping(mesh=None):
    """`(step, state, constants, batch)` of both methods in two microbatches, on a mesh or one device."""
    method = chain([("freelb", freelb(noise=0.1)), ("agem", AGEM)])
    settings = TrainSettings(steps=9, learning_rate=0.05, schedule="constant")
    tx = optimizer(settings, 9, describe(PARAMS))
    grad = step_gradient(method, LOSS, NAMES, 2)
    step = jax.jit(make_step(grad, tx, method, NAMES, ctx=Context(), largest_norm=1.0))
    state, constants, batch = create_state(dropout_key(3), PARAMS, {}, tx, NAMES), CONSTANTS, BATCH
    if mesh is not None:
        matrix, rows = NamedSharding(mesh, P("fsdp", "tensor")), NamedSharding(mesh, P(("data", "fsdp")))
        everywhere = NamedSharding(mesh, P())
        state = jax.tree.map(lambda a: jax.device_put(a, matrix if a.ndim == 2 else everywhere), state)
        constants, batch = jax.device_put((constants, batch), rows)
    return step, state, constants, batch


def states_of(steps, mesh=None):
    step, state, constants, batch = stepping(mesh)
    states = [state]
    for _ in range(steps):
        state, log = step(states[-1], constants, batch)
        assert int(log["nonfinite"]) == 0 and log["finite"].keys() == NAMES
        states.append(state)
    return states


def test_steps_on_a_mesh_equal_those_on_one_device():
    one, many = (states_of(3, mesh)[-1] for mesh in (None, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})))
    assert len(many.params["body"]["kernel"].sharding.device_set) == 8
    assert optax.tree.norm(jax.tree.map(jnp.subtract, one.params, PARAMS)) > 0.1
    for name in PARAMS:
        np.testing.assert_allclose(many.params[name]["kernel"], one.params[name]["kernel"], rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    step, _, constants, batch = stepping()
    states = states_of(4)
    store = Checkpoints(tmp_path)
    store.save(2, flatten(states[2]), {})
    shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in flatten(states[2]).items()}
    state = unflatten(states[2], store.restore(shapes)[1])
    store.close()
    for _ in range(2):
        state, _ = step(state, constants, batch)
    jax.tree.map(np.testing.assert_array_equal, state, states[4])


# Columns --------------------------------------------------------------------------------------------------------------


def test_a_column_is_differentiated_by_the_same_pass_under_its_name():
    batch = {**BATCH, PERTURBATION: normal(5, *BATCH["x"].shape)}
    passes = []

    def counted(*arguments):
        passes.append(True)
        return LOSS.fn(*arguments)

    grads, _ = gradient(Loss(counted), NAMES, {PERTURBATION})(PARAMS, {}, batch, Context())
    expected = jax.grad(lambda x: objective(PARAMS, {**batch, PERTURBATION: x}))(batch[PERTURBATION])
    without, _ = gradient(LOSS, NAMES)(PARAMS, {}, batch, Context())
    close(grads, {**without, PERTURBATION: expected})
    assert passes == [True]


def asking(column, microbatch_grad=lambda inner: inner) -> Method:
    return Method(microbatch_grad=microbatch_grad, grad_columns=frozenset({column}))


def with_column(dtype):
    def transform(inner):
        def fn(params, constants, batch, ctx, weights=None):
            return inner(params, constants, {**batch, "rows/x": jnp.ones(len(batch["x"]), dtype)}, ctx, weights)

        return fn

    return transform


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (asking("rows/x"), "rows/x, which is no column of the batch: .* adds it in its microbatch_grad"),
        (asking("rows/x", with_column(jnp.bfloat16)), "rows/x, which is bfloat16: it must be float32"),
        (asking("rows/x", with_column(jnp.float32)), "the gradient in rows/x leaves its microbatch: .* takes it out"),
    ],
    ids=["absent", "dtype", "left"],
)
def test_columns_are_checked(method, message, microbatches):
    with pytest.raises(ValueError, match=message):
        computed(method, microbatches)


def test_a_column_with_the_name_of_an_array_is_refused():
    with pytest.raises(ValueError, match="head/kernel: both an array that trains and a column"):
        step_gradient(asking("head/kernel"), LOSS, NAMES, 1)


def test_two_methods_do_not_share_a_column():
    lm = LM.initialize(model_config("gpt2", vocab_size=5, hidden_size=4, num_layers=1, num_heads=1), jax.random.key(0))
    both = [("freelb", freelb()), ("inner", chain([("smart", freelb())]))]
    with pytest.raises(ValueError, match=f"inner and freelb both take the gradient in {PERTURBATION}"):
        chain(both).init(jax.random.key(0), lm)
    assert isinstance(chain([both[0]]).init(jax.random.key(0), lm), MethodInit)


# Losses that couple rows ----------------------------------------------------------------------------------------------


def in_batch_negatives(inner: Loss) -> Loss:
    """Beside the loss that was there: every row is to resemble itself more than the other rows of the batch."""

    def fn(params, constants, batch, ctx):
        terms, outputs = inner.fn(params, constants, batch, ctx)
        rows = logits_of(params, batch).mean(axis=1)
        own = jnp.diagonal(jax.nn.log_softmax(rows @ rows.T))
        return {**terms, "negatives": Term(-own.sum(), jnp.float32(len(own)))}, outputs

    return inner._replace(fn=fn, couples=inner.couples | {"negatives"})


def test_a_loss_that_couples_rows_refuses_accumulation_by_name():
    loss = in_batch_negatives(LOSS)
    grads, terms = computed(Method(), 1, loss)
    assert terms["negatives"].weight == ROWS and np.isfinite(grads["body/kernel"]).all()
    with pytest.raises(ValueError, match=r"^negatives: .*config\.train\.grad_accum = 2 .* set it to 1"):
        step_gradient(Method(), loss, NAMES, 2)
    # What would be computed otherwise is another gradient.
    silent, _ = jax.jit(accumulate(gradient(loss, NAMES), loss._replace(couples=frozenset()), 2))(
        PARAMS, CONSTANTS, BATCH, Context()
    )
    assert np.abs(silent["body/kernel"] - grads["body/kernel"]).max() > 1e-3
