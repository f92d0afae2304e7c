"""Method: the bundle of pure functions that a config names, and the chain of several."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Int

from jaxlm.core.loss import GradFn, Loss
from jaxlm.core.model import LM
from jaxlm.core.partition import Verdict
from jaxlm.core.paths import Tree


class MethodInit(NamedTuple):
    """What `Method.init` returns.

    Attributes:
      lm: the model, possibly with new leaves, whose axes have names, or with Weights in the place of arrays.
      constants: sharded arguments of the step that never change and are not in the checkpoint (a teacher, say).
      state: arrays that change in training and are in the checkpoint, by name.
    """

    lm: LM
    constants: dict[str, Any] = {}
    state: dict[str, Any] = {}


class Step(NamedTuple):
    """What `Method.update` may change after the optimizer's update, in the run view.

    Attributes:
      params: the parameters, already updated.
      moments: optimizer state as a list of flat dicts by array name, those that mirror the parameters (Adam has two).
      state: the method's own state.
      previous: the parameters before the update, those that the gradients belong to; to read.
    """

    params: Tree
    moments: list[dict[str, jax.Array]]
    state: dict[str, Any]
    previous: Tree = {}


Grads = dict[str, jax.Array]
"""Gradients by array name, of the arrays that train."""


class Update(Protocol):
    """What a method does after the optimizer's update."""

    def __call__(self, step: Step, grads: Grads, constants: dict[str, Any], number: Int[Array, ""], /) -> Step:
        """The step with its parameters, moments or state changed; `number` counts updates from 1."""
        ...


class Method(NamedTuple):
    """Every field defaults to the identity, so that a method states only what it does.

    The gradient has two transforms, because a step may be computed in several microbatches. `grad` stands outside their
    accumulation: it transforms the gradient of the whole step. A-GEM, which projects it where it disagrees with that of
    a memory, belongs there; each microbatch projected by itself would be another direction. `microbatch_grad` stands
    inside: it sees the rows of one microbatch, `weights` being those of the whole step, and what it gives is added up.
    FreeLB, which climbs for some steps in a perturbation of the embeddings of every row, belongs there.

    An activation that the gradient is taken of is a float32 column of the batch, `[rows, …]`, that the forward pass
    adds to it wherever the batch has the column. `microbatch_grad` adds the column to the batch before it calls the
    gradient inside it, finds the gradient in it beside those in the parameters, from the same backward pass, and takes
    it out before it returns.

    Attributes:
      init: `(key, lm) -> MethodInit`, once, before the first step.
      trainable: ArrayInfo -> True, False or None; the last method with an opinion wins.
      loss: Loss -> Loss.
      grad: GradFn -> GradFn, outside accumulation.
      microbatch_grad: GradFn -> GradFn, inside accumulation.
      grad_columns: columns of the batch in which `microbatch_grad` needs the gradient; it adds and removes them.
      mask: `(params, grads) -> grads` that clipping and the optimizer see; `update` is given them as they were before.
      update: `(Step, grads, constants, step number) -> Step`, inside the compiled step.
      eval_params: `(params, state) -> params` seen by evaluation.
      bake: `(lm, state) -> lm`: plain leaves again, the same function.
      claims: `(params) -> {(path, aspect)}` that the method owns; two methods of a chain may not own the same.
    """

    init: Callable[[jax.Array, LM], MethodInit] = lambda key, lm: MethodInit(lm)
    trainable: Verdict = lambda info: None
    loss: Callable[[Loss], Loss] = lambda loss: loss
    grad: Callable[[GradFn], GradFn] = lambda grad: grad
    microbatch_grad: Callable[[GradFn], GradFn] = lambda grad: grad
    grad_columns: frozenset[str] = frozenset()
    mask: Callable[[Tree, Grads], Grads] = lambda params, grads: grads
    update: Update = lambda step, grads, constants, number: step
    eval_params: Callable[[Tree, dict], Tree] = lambda params, state: params
    bake: Callable[[LM, dict[str, Any]], LM] = lambda lm, state: lm
    claims: Callable[[Tree], set[tuple[str, str]]] = lambda params: set()


def chain(methods: Sequence[tuple[str, Method]]) -> Method:
    """One method that applies several named ones, in order; `bake` undoes them in reverse.

    Constants and state share one dict each, so that a method finds its own under the name it chose.

    Raises:
      ValueError: (from `init`) when two methods claim the same aspect of the same leaf, take the gradient in the same
        column, or use the same name.
    """

    def init(key, lm):
        result = MethodInit(lm)
        owners: dict[tuple[str, str], str] = {}
        askers: dict[str, str] = {}
        for index, (name, method) in enumerate(methods):
            for claim in sorted(method.claims(result.lm.params)):
                if claim in owners:
                    raise ValueError(f"{name} and {owners[claim]} both claim the {claim[1]} of {claim[0]}; drop one")
                owners[claim] = name
            for column in sorted(method.grad_columns):
                if column in askers:
                    raise ValueError(f"{name} and {askers[column]} both take the gradient in {column}; drop one")
                askers[column] = name
            new = method.init(jax.random.fold_in(key, index), result.lm)
            twice = (new.constants.keys() & result.constants.keys()) | (new.state.keys() & result.state.keys())
            if twice:
                raise ValueError(f"{name} is used twice in one run ({', '.join(sorted(twice))}); merge the two entries")
            result = MethodInit(new.lm, {**result.constants, **new.constants}, {**result.state, **new.state})
        return result

    def trainable(info):
        answers = [answer for _, method in methods if (answer := method.trainable(info)) is not None]
        return answers[-1] if answers else None

    def loss(inner):
        for _, method in methods:
            inner = method.loss(inner)
        return inner

    def grad(inner):
        for _, method in methods:
            inner = method.grad(inner)
        return inner

    def microbatch_grad(inner):
        for _, method in methods:
            inner = method.microbatch_grad(inner)
        return inner

    def mask(params, grads):
        for _, method in methods:
            grads = method.mask(params, grads)
        return grads

    def update(step, grads, constants, number):
        for _, method in methods:
            step = method.update(step, grads, constants, number)
        return step

    def eval_params(params, state):
        for _, method in methods:
            params = method.eval_params(params, state)
        return params

    def bake(lm, state):
        for _, method in reversed(methods):
            lm = method.bake(lm, state)
        return lm

    def claims(params):
        return set[tuple[str, str]]().union(*(method.claims(params) for _, method in methods))

    return Method(
        init=init,
        trainable=trainable,
        loss=loss,
        grad=grad,
        microbatch_grad=microbatch_grad,
        grad_columns=frozenset().union(*(method.grad_columns for _, method in methods)),
        mask=mask,
        update=update,
        eval_params=eval_params,
        bake=bake,
        claims=claims,
    )
