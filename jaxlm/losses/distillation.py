"""Distillation: what a student may learn from a teacher, its answers and its hidden states, and the method for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import Adapted, ArrayInfo, Context, Loss, Method, Tap, Term, Tree, dot, flatten, lookup, unflatten
from jaxlm.losses.cross_entropy import IGNORED

PROJECTION = "distill/projection/kernel"
LOWEST = -1e30
"""Logits below count as this: as improbable as -inf, but `0 · log 0` and its gradient are 0."""


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`Σ p (log p - log q)` over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """`KL(teacher‖student)` of log-probabilities `[..., classes]`."""
    return _kl(teacher, student)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """`KL(student‖teacher)`."""
    return _kl(student, teacher)


def jensen_shannon(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """`½ KL(teacher‖m) + ½ KL(student‖m)` with `m` their mean."""
    middle = jnp.logaddexp(teacher, student) - jnp.log(2.0)
    return 0.5 * _kl(teacher, middle) + 0.5 * _kl(student, middle)


DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jensen_shannon,
}


def response(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    valid: jax.Array,
    temperature: float = 2.0,
    divergence: Callable[[jax.Array, jax.Array], jax.Array] = forward_kl,
) -> Term:
    """`T² Σ_valid D(softmax(t/T), softmax(s/T))` and the number of valid positions.

    The factor `T²` keeps the gradient's size independent of the temperature: softened probabilities change `1/T` as
    fast, twice. Source: Hinton et al. 2015, arXiv:1503.02531.

    Args:
      teacher_logits, student_logits: float `[..., classes]`; the teacher's are not differentiated.
      valid: bool `[...]`; logits elsewhere may be anything, NaN too.

    >>> logits = jnp.array([[0.0, 1.0]])
    >>> float(response(logits, logits, jnp.array([True])).sum)
    0.0
    """

    def log_probabilities(logits: jax.Array) -> jax.Array:
        softened = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0) / temperature
        return jax.nn.log_softmax(jnp.maximum(softened, LOWEST), axis=-1)

    teacher = log_probabilities(jax.lax.stop_gradient(teacher_logits))
    each = divergence(teacher, log_probabilities(student_logits))
    return Term(temperature**2 * jnp.sum(jnp.where(valid, each, 0.0)), jnp.sum(valid.astype(jnp.float32)))


def hidden_distance(teacher: jax.Array, student: jax.Array, valid: jax.Array) -> Term:
    """`Σ_valid mean_j (t_j - s_j)²` of hidden states `[batch, length, width]`, and the number of valid tokens.

    Source: Jiao et al. 2020, TinyBERT, arXiv:1909.10351.
    """
    difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    each = jnp.mean(jnp.square(difference), axis=-1)
    return Term(jnp.sum(jnp.where(valid, each, 0.0)), jnp.sum(valid.astype(jnp.float32)))


def layer_map(student_layers: int, teacher_layers: int, kind: str | tuple[tuple[int, int], ...]) -> dict[int, int]:
    """Which teacher hidden state each student hidden state learns (0 is the embeddings, i the output of layer i).

    `uniform` spreads the student's layers over the teacher's, `last` maps them to its last ones, or explicit pairs.

    >>> layer_map(2, 4, "uniform")
    {0: 0, 1: 2, 2: 4}
    >>> layer_map(2, 4, "last")
    {1: 3, 2: 4}
    """
    if kind == "uniform":
        pairs = {i: round(i * teacher_layers / student_layers) for i in range(student_layers + 1)}
    elif kind == "last":
        pairs = {i: teacher_layers - student_layers + i for i in range(1, student_layers + 1)}
    elif isinstance(kind, str):
        raise ValueError(f"unknown layer map {kind!r}; known: uniform, last, or (student, teacher) pairs")
    else:
        pairs = dict(kind)
    for s, t in pairs.items():
        if not (0 <= s <= student_layers and 0 <= t <= teacher_layers):
            raise ValueError(f"layer pair ({s}, {t}) does not exist: 0..{student_layers} and 0..{teacher_layers} do")
    return pairs


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
    if temperature <= 0:
        raise ValueError(f"distill: temperature must be positive, not {temperature}")
    pairs: dict[int, int] = {}

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        new = Adapted(params, axes, constants={"teacher": teacher.params})
        width = model.config.hidden_size
        if model.config.head == "sequence" and model.config.regression:
            raise ValueError("distill: a regression has one output and no distribution to learn from")
        if not hidden:
            return new
        if model.config.encoder_decoder:
            raise ValueError("distill: hidden states of an encoder-decoder cannot be paired; set hidden to 0")
        pairs.clear()
        pairs.update(layer_map(model.config.num_layers, teacher.num_layers, layers))
        if width == teacher.hidden_size:
            return new
        kernel = jax.random.normal(key, (width, teacher.hidden_size)) * width**-0.5
        return new._replace(
            params=unflatten({**flatten(params), PROJECTION: kernel}), axes={**axes, PROJECTION: ("embed", None)}
        )

    def trainable(info: ArrayInfo) -> bool | None:
        return True if info.path == PROJECTION else None

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
                    own = dot(own, params["distill"]["projection"]["kernel"], ctx)
                seen = jnp.ones(own.shape[:2], bool) if tokens is None else tokens > 0
                term = hidden_distance(taught["taps"][Tap("hidden", t)], own, seen)
                terms[f"hidden_{s}"] = term._replace(coefficient=hidden / len(pairs))
            return terms, outputs

        return Loss(fn, inner.taps | student_taps)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        kept = {path: leaf for path, leaf in flatten(params).items() if path != PROJECTION}
        return model, unflatten(kept), {path: names for path, names in axes.items() if path != PROJECTION}

    return Method(init=init, trainable=trainable, loss=loss, bake=bake)
