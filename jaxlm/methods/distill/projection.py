"""Projections of a student's hidden states into its teacher's space: parameters of the training, not of the model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlm.core import Context, dot
from jaxlm.methods.distill.teacher import DistillConfig, LayerPairing

ROOT = "distill"
"""Where they lie in the parameter tree: `distill/teacher_0/projection/kernel`; dropped when the model is baked."""


def projections(
    key: jax.Array, config: DistillConfig, pairing: LayerPairing, *, number: int, width: int
) -> dict[str, Float32[Array, "student_width teacher_width"]]:
    """`{path: kernel}` of the teacher of that number; none where widths are equal and all pairs share one.

    A kernel begins as the identity where widths are equal, else as a random map that keeps lengths on average.
    """
    teacher = config.live
    if teacher is None or (config.projection == "shared" and width == teacher.hidden_size):
        return {}
    names = dict.fromkeys(_name(config, *pair) for pair in pairing.hidden)
    return {
        f"{ROOT}/teacher_{number}/{name}/kernel": _kernel(jax.random.fold_in(key, i), width, teacher.hidden_size)
        for i, name in enumerate(names)
    }


def _kernel(key: jax.Array, student: int, teacher: int) -> Float32[Array, "{student} {teacher}"]:
    return jnp.eye(student) if student == teacher else jax.random.normal(key, (student, teacher)) * student**-0.5


def _name(config: DistillConfig, s: int, t: int) -> str:
    return f"projection_{s}_{t}" if config.projection == "layer" else "projection"


def project(
    params: Mapping[str, Any],
    config: DistillConfig,
    x: Float[Array, "batch length student_width"],
    ctx: Context,
    *,
    number: int,
    pair: tuple[int, int],
) -> Float[Array, "batch length teacher_width"]:
    """The student's hidden state in the teacher's space, through the pair's projection if `params` have one."""
    projection = params.get(ROOT, {}).get(f"teacher_{number}", {}).get(_name(config, *pair))
    return x if projection is None else dot(x, projection["kernel"], ctx)
