"""A training run small enough to follow every entry: two stacked 8x8 matrices, Adam with decay."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from fast_to_compile import QUICK

from jaxlm.core import Context, Loss, Method, Term, describe, dot, trained_names
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.train.gradient import gradient
from jaxlm.train.optimizer import moments, optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import create_state, dropout_key, make_step

UP = "layers_0-1/mlp/up/kernel"
CONFIG = model_config("llama", vocab_size=8, hidden_size=8, num_layers=2, ffn_size=8, num_heads=1)
"""The network whose `up` kernels the two matrices are."""


class Followed(NamedTuple):
    """States after every step, from the one before the first, and what each step logged.

    `step` goes on from a state, and `grads` gives the gradient of the weight's base at one.
    """

    method: Method
    states: list
    logs: list
    step: Any
    grads: Any


def leaf(state):
    """The one weight of the run."""
    return state.params["layers_0-1"]["mlp"]["up"]["kernel"]


def both_moments(state, name=f"{UP}.base"):
    return [tree[name] for tree in moments(state.optimizer, frozenset({name}))]


def lm_of(params, axes=None):
    """The LM that holds these parameters alone, whatever they are; for methods that read no more of it than those."""
    return LM(CONFIG, params, axes=axes or {})


def start_of(wrap):
    """The LM that training begins from: two layers with entries of unequal size, `wrap(matrix, layer number)` each."""
    values = jax.random.normal(jax.random.key(0), (2, 8, 8)) * jnp.array([1.0, 0.5])[:, None, None]
    return lm_of({f"layers_{i}": {"mlp": {"up": {"kernel": wrap(values[i], i)}}} for i in range(2)})


def follow(method, steps, wrap=lambda values, i: values, norm=0.0, skipped=(), decay=0.3) -> Followed:
    """Training towards a target; the loss of the steps in `skipped` is not finite."""
    x, target = (jax.random.normal(jax.random.key(s), (2, 5, 8)) for s in (1, 2))

    def fn(params, constants, batch, ctx):
        out = jax.vmap(lambda w, x: dot(x, w))(params["layers_0-1"]["mlp"]["up"]["kernel"], x)
        return {"squares": Term(jnp.sum((out - target) ** 2) * batch["factor"], jnp.float32(1))}, {}

    lm, _, method_state = method.init(jax.random.key(0), start_of(wrap))
    params = lm.network.run_view(lm.params)
    infos = describe(params)
    trained = trained_names(infos, [method.trainable])
    settings = TrainSettings(steps=9, learning_rate=0.05, schedule="constant", weight_decay=decay)
    tx = optimizer(settings, 9, {name: infos[name] for name in trained})
    grad = gradient(Loss(fn), trained)
    step = jax.jit(
        make_step(grad, tx, method, trained, ctx=Context(), largest_norm=norm),
        compiler_options=QUICK,
    )
    states, logs = [create_state(dropout_key(0), params, method_state, tx, trained)], []
    for number in range(1, steps + 1):
        factor = jnp.float32("nan") if number in skipped else jnp.float32(1)
        state, log = step(states[-1], {}, {"factor": factor})
        states.append(state)
        logs.append(log)
    one = {"factor": jnp.float32(1)}
    grads = lambda state: grad(state.params, {}, one, Context())[0][f"{UP}.base"]  # noqa: E731
    return Followed(method, states, logs, lambda state: step(state, {}, one)[0], grads)


@pytest.fixture(scope="session")
def run():
    """What tests of methods need, under one name."""
    return SimpleNamespace(follow=follow, leaf=leaf, moments=both_moments, start=start_of, lm_of=lm_of, path=UP)
