"""The method of distillation: the lessons of one or several teachers, beside the loss that was there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlm.core import Adapted, ArrayInfo, Context, Loss, Method, Terms, Tree, flatten, nearest, unflatten
from jaxlm.methods.distill.projection import OWN, project, projections
from jaxlm.methods.distill.teacher import Lesson, Plan, shares
from jaxlm.methods.distill.terms import inner_terms, joint_response, response_terms

COMBINE = ("divergences", "probabilities", "logits")
Sampler = Callable[[Tree, dict[str, jax.Array], jax.Array], dict[str, jax.Array]]


def distill(
    lessons: Sequence[Lesson],
    *,
    alpha: float = 0.5,
    combine: str = "divergences",
    on_policy: Sampler | None = None,
) -> Method:
    """`(1 - α) L + Σ_i w_i (α T² D(teacher_i, student) + hidden + attention + relations)`, L being the loss without.

    Args:
      lessons: what is learned from each teacher; their weights w sum to 1.
      alpha: share of the teachers' answers; 0 leaves them out.
      combine: what is averaged over several teachers: their `divergences`, or before one divergence their
        `probabilities` (a mixture) or `logits` (normalised geometric mean). In the forward direction the first two have
        the same gradient.
      on_policy: `(params, batch, key) -> batch`, lets the student write what the teachers then judge.
    """
    share_of = shares(lessons)
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill: alpha must lie between 0 and 1, not {alpha}")
    check_combination(lessons, combine, on_policy)
    plans: list[Plan] = []  # known with the student's layers

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        check_student(model.config, lessons, alpha)
        plans[:] = [lesson.plan(model.config.num_layers) for lesson in lessons]
        new: dict[str, jax.Array] = {}
        for i, (lesson, plan) in enumerate(zip(lessons, plans, strict=True)):
            new |= projections(jax.random.fold_in(key, i), lesson, plan, i, model.config.hidden_size)
        teachers = tuple({} if lesson.live is None else lesson.live.params for lesson in lessons)
        return Adapted(
            unflatten({**flatten(params), **new}),
            {**axes, **dict.fromkeys(new, ("embed", None))},
            constants={"teachers": teachers},
        )

    def trainable(info: ArrayInfo) -> bool | None:
        return True if info.path.startswith(f"{OWN}/") else None

    def loss(inner: Loss) -> Loss:
        def fn(params: Tree, constants: dict, batch: dict, ctx: Context):
            terms, outputs = inner.fn(params, constants, batch, ctx)
            terms = scaled(terms, 1 - alpha)
            taught = [
                {} if lesson.live is None else lesson.live.forward(weights, batch, plan.taps(side=1))
                for lesson, plan, weights in zip(lessons, plans, constants["teachers"], strict=True)
            ]
            taught = jax.lax.stop_gradient(taught)
            learned: list[Terms] = [{} for _ in lessons]
            if alpha and combine != "divergences":
                together = joint_response(lessons, share_of, combine, taught, outputs["logits"], batch)
                terms |= scaled(together, alpha)
            elif alpha:
                each = response_terms(lessons, taught, outputs["logits"], batch)
                learned = [scaled(term, alpha) for term in each]
            for i, (lesson, plan) in enumerate(zip(lessons, plans, strict=True)):

                def in_their_space(pair: tuple[int, int], x: jax.Array, i=i, lesson=lesson) -> jax.Array:
                    return project(params, lesson, i, pair, x, ctx)

                theirs, own = taught[i].get("taps", {}), outputs.get("taps", {})
                learned[i] |= inner_terms(lesson, plan, theirs, own, batch, in_their_space)
                prefix = f"teacher_{i}_" if len(lessons) > 1 else ""
                terms |= {prefix + name: term for name, term in scaled(learned[i], share_of[i]).items()}
            return terms, outputs

        return Loss(fn, inner.taps.union(*(plan.taps(side=0) for plan in plans)))

    def grad(inner: Callable) -> Callable:
        if on_policy is None:
            return inner

        def fn(params: Tree, constants: dict, batch: dict, ctx: Context, *rest: Any):
            key = ctx.at("on_policy").key
            assert key is not None, "the student writes in training only, where there is a key"
            return inner(params, constants, on_policy(params, batch, key), ctx, *rest)

        return fn

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        kept = {path: leaf for path, leaf in flatten(params).items() if not path.startswith(f"{OWN}/")}
        return model, unflatten(kept), {path: axes[path] for path in kept}

    return Method(init=init, trainable=trainable, loss=loss, grad=grad, bake=bake)


def scaled(terms: Terms, factor: float) -> Terms:
    """Terms with their coefficients multiplied."""
    return {name: term._replace(coefficient=factor * term.coefficient) for name, term in terms.items()}


def check_combination(lessons: Sequence[Lesson], combine: str, on_policy: Sampler | None) -> None:
    """Raises ValueError for teachers that cannot be heard together, or cannot judge what the student writes."""
    if combine not in COMBINE:
        raise ValueError(f"distill: combine {combine!r}; {nearest(combine, COMBINE)}")
    cached = any(lesson.live is None for lesson in lessons)
    if on_policy is not None and cached:
        raise ValueError(
            "distill: a cache has answers to its data only, not to what the student writes; leave out one of them"
        )
    if combine == "divergences":
        return
    if cached:
        raise ValueError(f"distill: caches keep other tokens of each teacher; combine their divergences, not {combine}")
    settings = {(lesson.temperature, lesson.divergence, lesson.beta, lesson.sample_weight) for lesson in lessons}
    if len(settings) > 1:
        raise ValueError(
            f"distill: with combine = {combine!r} there is one divergence, but the teachers differ in temperature, "
            "divergence, beta or sample_weight; set these once, beside alpha"
        )


def check_student(config: Any, lessons: Sequence[Lesson], alpha: float) -> None:
    """Raises ValueError for a student that has not what the lessons compare."""
    if alpha and config.head == "sequence" and config.regression:
        raise ValueError(
            "distill: a regression has one output and no distribution to learn from; set alpha to 0 and give hidden, "
            "attention or relations a coefficient"
        )
    if config.encoder_decoder and any(lesson.inner for lesson in lessons):
        raise ValueError(
            "distill: hidden states and attention of an encoder-decoder cannot be paired; set hidden, attention and "
            "relations to 0"
        )
