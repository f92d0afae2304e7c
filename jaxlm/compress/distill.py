"""Distillation as a method: adds the teacher's terms to the loss, and drops its projection when done."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import Adapted, Context, Loss, Method, Tap, Tree, flatten, lookup, unflatten
from jaxlm.losses.cross_entropy import IGNORED
from jaxlm.losses.distillation import DIVERGENCES, hidden_distance, layer_map, response

PROJECTION = "distill/projection/kernel"


class Teacher(NamedTuple):
    """A model to learn from: `forward(params, batch, taps) -> outputs`, deterministic; its parameters; its sizes."""

    forward: Callable[..., dict[str, Any]]
    params: Tree
    num_layers: int
    hidden_size: int


def distill(
    teacher: Teacher,
    *,
    alpha: float = 0.5,
    temperature: float = 2.0,
    divergence: str = "forward",
    hidden: float = 0.0,
    layers: str | tuple = "uniform",
) -> Method:
    """`α T² D(teacher, student) + (1 - α) L + hidden · Σ_pairs ‖t - P s‖² / pairs`, `L` being the loss without teacher.

    Args:
      teacher: what to learn from.
      alpha: share of the teacher's answers.
      temperature: softens both sides' answers.
      divergence: `forward` = KL(teacher‖student), `reverse` = KL(student‖teacher), `jsd`.
      hidden: coefficient of the hidden-state term; 0 leaves it out.
      layers: layer map of the hidden-state term (`uniform`, `last`, or pairs).
    """
    measure = lookup(DIVERGENCES, divergence, "divergence")
    pairs: dict[int, int] = {}

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        new = Adapted(params, axes, constants={"teacher": teacher.params})
        width = model.config.hidden_size
        if not hidden:
            return new
        pairs.update(layer_map(model.config.num_layers, teacher.num_layers, layers))
        if width == teacher.hidden_size:
            return new
        kernel = jax.random.normal(key, (width, teacher.hidden_size)) * width**-0.5
        return new._replace(
            params=unflatten({**flatten(params), PROJECTION: kernel}), axes={**axes, PROJECTION: ("embed", None)}
        )

    def loss(inner: Loss) -> Loss:
        student_taps = frozenset(Tap("hidden", s) for s in pairs)
        teacher_taps = frozenset(Tap("hidden", t) for t in pairs.values())

        def fn(params: Tree, constants: dict, batch: dict, ctx: Context):
            terms, outputs = inner.fn(params, constants, batch, ctx)
            taught = jax.lax.stop_gradient(teacher.forward(constants["teacher"], batch, teacher_taps))
            terms = {name: t._replace(coefficient=t.coefficient * (1 - alpha)) for name, t in terms.items()}
            labels = batch["labels"]
            valid = labels != IGNORED if labels.dtype.kind == "i" else ~jnp.isnan(labels)
            term = response(taught["logits"], outputs["logits"], valid, temperature, measure)
            terms["response"] = term._replace(coefficient=alpha)
            tokens = batch.get("segment_ids", batch.get("attention_mask")) if pairs else None
            for s, t in pairs.items():
                own = outputs["taps"][Tap("hidden", s)]
                if "distill" in params:
                    own = own @ params["distill"]["projection"]["kernel"].astype(own.dtype)
                seen = jnp.ones(own.shape[:2], bool) if tokens is None else tokens > 0
                term = hidden_distance(taught["taps"][Tap("hidden", t)], own, seen)
                terms[f"hidden_{s}"] = term._replace(coefficient=hidden / len(pairs))
            return terms, outputs

        return Loss(fn, inner.taps | student_taps)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        kept = {path: leaf for path, leaf in flatten(params).items() if path != PROJECTION}
        return model, unflatten(kept), {path: names for path, names in axes.items() if path != PROJECTION}

    return Method(init=init, loss=loss, bake=bake)
