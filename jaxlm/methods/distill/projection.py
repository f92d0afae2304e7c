"""Projections of a student's hidden states into its teacher's space: parameters of the training, not of the model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import Context, dot
from jaxlm.methods.distill.teacher import Lesson, Plan

OWN = "distill"
"""Where they live in the parameter tree: `distill/teacher_0/projection/kernel`; dropped when the model is baked."""


def projections(key: jax.Array, lesson: Lesson, plan: Plan, number: int, width: int) -> dict[str, jax.Array]:
    """`{path: kernel [student's width, teacher's width]}` of one lesson; none where equal widths share nothing to map.

    A kernel begins as the identity where widths are equal, else as a random map that keeps lengths on average.
    """
    teacher = lesson.live
    if teacher is None or (lesson.projection == "shared" and width == teacher.hidden_size):
        return {}
    names = dict.fromkeys(_name(lesson, *pair) for pair in plan.hidden)
    return {
        f"{OWN}/teacher_{number}/{name}/kernel": _kernel(jax.random.fold_in(key, i), width, teacher.hidden_size)
        for i, name in enumerate(names)
    }


def _kernel(key: jax.Array, own: int, theirs: int) -> jax.Array:
    return jnp.eye(own) if own == theirs else jax.random.normal(key, (own, theirs)) * own**-0.5


def _name(lesson: Lesson, s: int, t: int) -> str:
    return f"projection_{s}_{t}" if lesson.projection == "layer" else "projection"


def project(
    params: Mapping[str, Any], lesson: Lesson, number: int, pair: tuple[int, int], x: jax.Array, ctx: Context
) -> jax.Array:
    """The student's hidden state in the teacher's space, through the pair's projection if `params` have one."""
    own = params.get(OWN, {}).get(f"teacher_{number}", {}).get(_name(lesson, *pair))
    return x if own is None else dot(x, own["kernel"], ctx)
