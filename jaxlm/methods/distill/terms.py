"""The terms of distillation: which outputs of a student are compared with which of its teachers', and where."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import Batch, Tap, Terms, nearest, text_rows
from jaxlm.losses.attention import attention_distance
from jaxlm.losses.cross_entropy import IGNORED
from jaxlm.losses.hidden import hidden_distance
from jaxlm.losses.relations import relation_distance, relation_heads
from jaxlm.losses.soft_targets import mean_logits, mixture_logits, response, top_response
from jaxlm.losses.weighting import SampleWeights
from jaxlm.methods.distill.teacher import CachedTeacher, DistillConfig, LayerPairing

Taps = Mapping[Tap, jax.Array]
Project = Callable[[tuple[int, int], Float[Array, "batch length student_width"]], Array]
"""`(pair of layers, student's hidden state) -> the same in the teacher's space`."""


def answered(batch: Batch) -> Bool[Array, "batch *length"]:
    """The distillation mask: where a teacher's answer is learned.

    That is where a label counts; a column `distill_mask` says it of unlabelled data and of what the student wrote.
    """
    if "distill_mask" in batch:
        return text_rows(batch)["distill_mask"].astype(bool)
    labels = batch["labels"]
    return labels != IGNORED if labels.dtype.kind == "i" else ~jnp.isnan(labels)


def segments_of(batch: Batch) -> Int[Array, "batch length"]:
    """Segments of the tokens: 0 for padding, and in rows that have nothing to learn (filler)."""
    batch = text_rows(batch)
    mask = batch.get("segment_ids", batch.get("attention_mask"))
    segments = jnp.ones(batch["input_ids"].shape, jnp.int32) if mask is None else jnp.asarray(mask)
    counts = answered(batch).reshape(segments.shape[0], -1).any(axis=1)
    return jnp.where(counts[:, None], segments, 0)


def sample_weights(config: DistillConfig, batch: Batch) -> SampleWeights | None:
    """The column that weighs the samples, if the config names one."""
    name = config.sample_weight
    if name is not None and name not in batch:
        raise ValueError(f"distill: sample_weight {name!r} is no column of the batch; {nearest(name, batch)}")
    return None if name is None else batch[name]


def response_terms(
    configs: Sequence[DistillConfig],
    teacher_outputs: Sequence[Mapping[str, Any]],
    student_logits: Float[Array, "batch *length classes"],
    batch: Batch,
) -> list[Terms]:
    """For each teacher, the term of its answers."""
    terms = []
    for config, outputs in zip(configs, teacher_outputs, strict=True):
        student, teacher = _shared(config, student_logits), config.teacher
        settings: dict[str, Any] = {
            "temperature": config.temperature,
            "divergence": config.measure,
            "weights": sample_weights(config, batch),
        }
        if isinstance(teacher, CachedTeacher):
            answers = teacher.answers(batch)
            term = top_response(answers, student, answered(batch), teacher.temperatures, **settings)
        else:
            term = response(_shared(config, outputs["logits"]), student, answered(batch), **settings)
        terms.append({"response": term})
    return terms


def joint_response(
    configs: Sequence[DistillConfig],
    shares: Sequence[float],
    combine: str,
    teacher_outputs: Sequence[Mapping[str, Any]],
    student_logits: Float[Array, "batch *length classes"],
    batch: Batch,
) -> Terms:
    """The term of the answers of all teachers together, averaged as `probabilities` or as `logits`."""
    first = configs[0]  # they agree in the settings of the term, see `check_combination`
    logits = [_shared(config, outputs["logits"]) for config, outputs in zip(configs, teacher_outputs, strict=True)]
    classes = min(x.shape[-1] for x in logits)
    logits = [x[..., :classes] for x in logits]
    mean = mean_logits(logits, shares) if combine == "logits" else mixture_logits(logits, shares, first.temperature)
    term = response(
        mean,
        student_logits[..., :classes],
        answered(batch),
        temperature=first.temperature,
        divergence=first.measure,
        weights=sample_weights(first, batch),
    )
    return {"response": term}


def _shared(
    config: DistillConfig, logits: Float[Array, "batch *length classes"]
) -> Float[Array, "batch *length shared"]:
    """The outputs that teacher and student share."""
    return logits if config.teacher.classes is None else logits[..., : config.teacher.classes]


def inner_terms(
    config: DistillConfig,
    pairing: LayerPairing,
    *,
    teacher_taps: Taps,
    student_taps: Taps,
    batch: Batch,
    project: Project,
) -> Terms:
    """Hidden states, attention and relations; each kind divides its coefficient among its pairs."""
    if not config.inner:
        return {}
    segments, weights = segments_of(batch), sample_weights(config, batch)
    tokens = segments > 0
    terms: Terms = {}
    for s, t in pairing.hidden:
        student = project((s, t), jnp.where(tokens[..., None], student_taps[Tap("hidden", s)], 0))
        term = hidden_distance(teacher_taps[Tap("hidden", t)], student, tokens, weights)
        terms[f"hidden_{s}_{t}"] = term._replace(coefficient=config.hidden / len(pairing.hidden))
    for s, t in pairing.attention:
        teacher, student = teacher_taps[Tap("scores", t - 1)], student_taps[Tap("scores", s - 1)]
        term = attention_distance(teacher, student, tokens, on=config.attention_on, heads=config.heads, weights=weights)
        terms[f"attention_{s}_{t}"] = term._replace(coefficient=config.attention / len(pairing.attention))
    for s, t in pairing.relations:
        for site in config.relation_of:
            teacher, student = teacher_taps[Tap(site, t - 1)], student_taps[Tap(site, s - 1)]
            heads = relation_heads([x.shape[2] * x.shape[3] for x in (teacher, student)], config.relation_heads)
            term = relation_distance(teacher, student, segments, heads, weights)
            share = config.relations / len(pairing.relations) / len(config.relation_of)
            terms[f"{site}_relation_{s}_{t}"] = term._replace(coefficient=share)
    return terms
