"""The terms of lessons: what of a student's outputs is compared with what of its teachers', and who counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Tap, Terms, nearest
from jaxlm.losses.attention import attention_distance
from jaxlm.losses.cross_entropy import IGNORED
from jaxlm.losses.hidden import hidden_distance
from jaxlm.losses.relations import relation_distance, relation_heads
from jaxlm.losses.soft_targets import mean_logits, mixture_logits, response, top_response
from jaxlm.methods.distill.teacher import CachedTeacher, Lesson, Plan

Batch = Mapping[str, jax.Array]
Taps = Mapping[Tap, jax.Array]


def answered(batch: Batch) -> jax.Array:
    """Where a teacher's answer is learned: where a label counts; a column `scored` says it for texts without labels and
    for what the student wrote itself."""
    if "scored" in batch:
        return batch["scored"].astype(bool)
    labels = batch["labels"]
    return labels != IGNORED if labels.dtype.kind == "i" else ~jnp.isnan(labels)


def segments_of(batch: Batch) -> jax.Array:
    """Segments of the tokens, int `[batch, length]`: 0 for padding, and in rows that have nothing to learn (filler)."""
    known = batch.get("segment_ids", batch.get("attention_mask"))
    segments = jnp.ones(batch["input_ids"].shape, jnp.int32) if known is None else jnp.asarray(known)
    counts = answered(batch).reshape(segments.shape[0], -1).any(axis=1)
    return jnp.where(counts[:, None], segments, 0)


def sample_weights(lesson: Lesson, batch: Batch) -> jax.Array | None:
    """The column that weighs the samples, if the lesson names one."""
    name = lesson.sample_weight
    if name is not None and name not in batch:
        raise ValueError(f"distill: sample_weight {name!r} is no column of the batch; {nearest(name, batch)}")
    return None if name is None else batch[name]


def response_terms(
    lessons: Sequence[Lesson], taught: Sequence[Mapping[str, Any]], logits: jax.Array, batch: Batch
) -> list[Terms]:
    """For each teacher, the term of its answers."""
    found = []
    for lesson, outputs in zip(lessons, taught, strict=True):
        settings = lesson.temperature, lesson.measure, sample_weights(lesson, batch)
        own, teacher = _shared(lesson, logits), lesson.teacher
        if isinstance(teacher, CachedTeacher):
            term = top_response(teacher.answers(batch), own, answered(batch), teacher.temperatures, *settings)
        else:
            term = response(_shared(lesson, outputs["logits"]), own, answered(batch), *settings)
        found.append({"response": term})
    return found


def joint_response(
    lessons: Sequence[Lesson],
    shares: Sequence[float],
    combine: str,
    taught: Sequence[Mapping[str, Any]],
    logits: jax.Array,
    batch: Batch,
) -> Terms:
    """The term of the answers of all teachers together, averaged as `probabilities` or as `logits`."""
    first = lessons[0]
    each = [_shared(lesson, outputs["logits"]) for lesson, outputs in zip(lessons, taught, strict=True)]
    width = min(x.shape[-1] for x in each)
    each = [x[..., :width] for x in each]
    mean = mean_logits(each, shares) if combine == "logits" else mixture_logits(each, shares, first.temperature)
    settings = first.temperature, first.measure, sample_weights(first, batch)
    return {"response": response(mean, logits[..., :width], answered(batch), *settings)}


def _shared(lesson: Lesson, logits: jax.Array) -> jax.Array:
    """The outputs that teacher and student share."""
    return logits if lesson.teacher.classes is None else logits[..., : lesson.teacher.classes]


def inner_terms(
    lesson: Lesson,
    plan: Plan,
    theirs: Taps,
    own: Taps,
    batch: Batch,
    project: Callable[[tuple[int, int], jax.Array], jax.Array],
) -> Terms:
    """Hidden states, attention and relations; each kind divides its coefficient among its pairs."""
    if not lesson.inner:
        return {}
    segments, weights = segments_of(batch), sample_weights(lesson, batch)
    tokens = segments > 0
    terms: Terms = {}
    for s, t in plan.hidden:
        student = project((s, t), jnp.where(tokens[..., None], own[Tap("hidden", s)], 0))
        term = hidden_distance(theirs[Tap("hidden", t)], student, tokens, weights)
        terms[f"hidden_{s}_{t}"] = term._replace(coefficient=lesson.hidden / len(plan.hidden))
    for s, t in plan.attention:
        scores = theirs[Tap("scores", t - 1)], own[Tap("scores", s - 1)]
        term = attention_distance(*scores, tokens, lesson.attention_on, lesson.heads, weights)
        terms[f"attention_{s}_{t}"] = term._replace(coefficient=lesson.attention / len(plan.attention))
    for s, t in plan.relations:
        for site in lesson.relation_of:
            teacher, student = theirs[Tap(site, t - 1)], own[Tap(site, s - 1)]
            heads = relation_heads([x.shape[2] * x.shape[3] for x in (teacher, student)], lesson.relation_heads)
            term = relation_distance(teacher, student, segments, heads, weights)
            share = lesson.relations / len(plan.relations) / len(lesson.relation_of)
            terms[f"{site}_relation_{s}_{t}"] = term._replace(coefficient=share)
    return terms
