"""The method of distillation: the configs of one or several teachers, beside the loss that was there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxlm.core import (
    LM,
    ArrayInfo,
    Batch,
    Context,
    GradFn,
    Loss,
    Method,
    MethodInit,
    Terms,
    Tree,
    flatten,
    nearest,
    unflatten,
)
from jaxlm.methods.distill.on_policy import Sampler
from jaxlm.methods.distill.projection import ROOT, project, projections
from jaxlm.methods.distill.teacher import DistillConfig, LayerPairing, shares
from jaxlm.methods.distill.terms import inner_terms, joint_response, response_terms

COMBINE = ("divergences", "probabilities", "logits")


def distill(
    configs: Sequence[DistillConfig],
    *,
    alpha: float = 0.5,
    combine: str = "divergences",
    on_policy: Sampler | None = None,
) -> Method:
    """`(1 - α) L + Σ_i w_i (α T² D(teacher_i, student) + hidden + attention + relations)`, L being the loss without.

    Source: Hinton et al. 2015, arXiv:1503.02531; hidden states, Jiao et al. 2020, TinyBERT, arXiv:1909.10351;
    attention, Wang et al. 2020, MiniLM, arXiv:2002.10957; relations, Wang et al. 2021, MiniLMv2, arXiv:2012.15828;
    on the student's text, Agarwal et al. 2023, GKD, arXiv:2306.13649.

    When: after every cut, from the model that was cut, and for a student of fewer layers; on unlabelled data too.

    Args:
      configs: what is distilled from each teacher; their weights w sum to 1.
      alpha: share of the teachers' answers; 0 leaves them out.
      combine: what is averaged over several teachers: their `divergences`, or before one divergence their
        `probabilities` (a mixture) or `logits` (normalised geometric mean). In the forward direction the first two have
        the same gradient.
      on_policy: lets the student write what the teachers then judge.
    """
    share_of = shares(configs)
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill: alpha must lie between 0 and 1, not {alpha}")
    check_combination(configs, combine, on_policy)
    # Which layers are paired depends on how many the student has. `loss` has to say what it reads before there is a
    # batch or a constant, so `init` leaves it here.
    pairings: list[LayerPairing] = []

    def init(key: jax.Array, lm: LM) -> MethodInit:
        check_student(lm.config, configs, alpha)
        pairings[:] = [config.pairing(lm.config.num_layers) for config in configs]
        kernels: dict[str, jax.Array] = {}
        for i, (config, pairing) in enumerate(zip(configs, pairings, strict=True)):
            folded = jax.random.fold_in(key, i)
            kernels |= projections(folded, config, pairing, number=i, width=lm.config.hidden_size)
        teachers = tuple({} if config.live is None else config.live.params for config in configs)
        params, axes = unflatten(flatten(lm.params) | kernels), dict(lm.axes) | dict.fromkeys(kernels, ("embed", None))
        return MethodInit(lm.replace(params=params, axes=axes), constants={"teachers": teachers})

    def trainable(info: ArrayInfo) -> bool | None:
        return True if info.path.startswith(f"{ROOT}/") else None

    def loss(inner: Loss) -> Loss:
        def fn(params: Tree, constants: dict, batch: Batch, ctx: Context):
            # The student's pass, and the loss without teachers.
            terms, outputs = inner.fn(params, constants, batch, ctx)
            terms = scaled(terms, 1 - alpha)

            # The teachers' passes; those in a cache have no outputs.
            teacher_outputs = jax.lax.stop_gradient(
                [
                    {} if config.live is None else config.live.forward(weights, batch, pairing.taps(side=1))
                    for config, pairing, weights in zip(configs, pairings, constants["teachers"], strict=True)
                ]
            )

            # Answers, of all teachers together or of each.
            by_teacher: list[Terms] = [{} for _ in configs]
            if alpha and combine != "divergences":
                joint = joint_response(configs, share_of, combine, teacher_outputs, outputs["logits"], batch)
                terms |= scaled(joint, alpha)
            elif alpha:
                responses = response_terms(configs, teacher_outputs, outputs["logits"], batch)
                by_teacher = [scaled(term, alpha) for term in responses]

            # Hidden states, attention and relations.
            for i, (config, pairing) in enumerate(zip(configs, pairings, strict=True)):

                def to_teacher(pair: tuple[int, int], x: jax.Array, i=i, config=config) -> jax.Array:
                    return project(params, config, x, ctx, number=i, pair=pair)

                by_teacher[i] |= inner_terms(
                    config,
                    pairing,
                    teacher_taps=teacher_outputs[i].get("taps", {}),
                    student_taps=outputs.get("taps", {}),
                    batch=batch,
                    project=to_teacher,
                )
                prefix = f"teacher_{i}_" if len(configs) > 1 else ""
                terms |= {prefix + name: term for name, term in scaled(by_teacher[i], share_of[i]).items()}
            return terms, outputs

        return inner._replace(fn=fn, taps=inner.taps.union(*(pairing.taps(side=0) for pairing in pairings)))

    def grad(inner: GradFn) -> GradFn:
        if on_policy is None:
            return inner

        def fn(params: Tree, constants: dict, batch: Batch, ctx: Context, weights: Mapping[str, Any] | None = None):
            key = ctx.at("on_policy").key
            assert key is not None, "the student writes in training only, where there is a key"
            return inner(params, constants, on_policy(params, batch, key), ctx, weights)

        return fn

    def bake(lm: LM, state: dict[str, Any]) -> LM:
        params = {path: leaf for path, leaf in flatten(lm.params).items() if not path.startswith(f"{ROOT}/")}
        return lm.replace(params=unflatten(params), axes={path: lm.axes[path] for path in params})

    return Method(init=init, trainable=trainable, loss=loss, grad=grad, bake=bake)


def scaled(terms: Terms, factor: float) -> Terms:
    """Terms with their coefficients multiplied."""
    return {name: term._replace(coefficient=factor * term.coefficient) for name, term in terms.items()}


def check_combination(configs: Sequence[DistillConfig], combine: str, on_policy: Sampler | None) -> None:
    """Raises ValueError for teachers that cannot be combined, or cannot judge what the student writes."""
    if combine not in COMBINE:
        raise ValueError(f"distill: combine {combine!r}; {nearest(combine, COMBINE)}")
    cached = any(config.live is None for config in configs)
    if on_policy is not None and cached:
        raise ValueError(
            "distill: a cache has answers to its data only, not to what the student writes; leave out one of them"
        )
    if combine == "divergences":
        return
    if cached:
        raise ValueError(f"distill: caches keep other tokens of each teacher; combine their divergences, not {combine}")
    settings = {(config.temperature, config.divergence, config.beta, config.sample_weight) for config in configs}
    if len(settings) > 1:
        raise ValueError(
            f"distill: with combine = {combine!r} there is one divergence, but the teachers differ in temperature, "
            "divergence, beta or sample_weight; set these once, beside alpha"
        )


def check_student(student: Any, configs: Sequence[DistillConfig], alpha: float) -> None:
    """Raises ValueError for a student that has not what the configs compare."""
    if alpha and student.head == "sequence" and student.regression:
        raise ValueError(
            "distill: a regression has one output and no distribution to learn from; set alpha to 0 and give hidden, "
            "attention or relations a coefficient"
        )
    if student.encoder_decoder and any(config.inner for config in configs):
        raise ValueError(
            "distill: hidden states and attention of an encoder-decoder cannot be paired; set hidden, attention and "
            "relations to 0"
        )
