"""Learning a teacher's answers: its distribution over classes or tokens, whole, of several teachers, or its top k."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.core import Term
from jaxlm.losses.divergence import LOWEST, Divergence, forward_kl, log_probabilities
from jaxlm.losses.weighting import weighed


def response(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    valid: jax.Array,
    temperature: float = 2.0,
    divergence: Divergence = forward_kl,
    weights: jax.Array | None = None,
) -> Term:
    """`T² Σ_valid w D(softmax(t/T), softmax(s/T))` and `Σ_valid w`.

    The factor `T²` keeps the gradient's size independent of the temperature: softened probabilities change `1/T` as
    fast, twice. Source: Hinton et al. 2015, arXiv:1503.02531.

    Args:
      teacher_logits, student_logits: float `[..., classes]`; the teacher's are not differentiated.
      valid: bool `[...]`; logits elsewhere may be anything, NaN too.
      weights: of samples or positions, see `weighed`.

    >>> logits = jnp.array([[0.0, 1.0]])
    >>> float(response(logits, logits, jnp.array([True])).sum)
    0.0
    """
    teacher = log_probabilities(jax.lax.stop_gradient(teacher_logits), valid, temperature)
    each = divergence(teacher, log_probabilities(student_logits, valid, temperature))
    return weighed(temperature**2 * each, valid, weights)


def mean_logits(logits: Sequence[jax.Array], shares: Sequence[float]) -> jax.Array:
    """`Σ w_i z_i`: the geometric mean of the teachers, once normalised; what one of them excludes stays excluded.

    >>> mean_logits([jnp.array([0.0, 2.0]), jnp.array([4.0, 2.0])], [0.25, 0.75]).tolist()
    [3.0, 2.0]
    """
    each = [w * jnp.maximum(z.astype(jnp.float32), LOWEST) for w, z in zip(shares, logits, strict=True)]
    return jnp.sum(jnp.stack(each), axis=0)


def mixture_logits(logits: Sequence[jax.Array], shares: Sequence[float], temperature: float) -> jax.Array:
    """`T log Σ w_i softmax(z_i / T)`: logits whose distribution at temperature T is the mean of the teachers'.

    >>> even, certain = jnp.zeros(2), jnp.array([0.0, -50.0])
    >>> [round(p, 4) for p in jnp.exp(mixture_logits([even, certain], [0.5, 0.5], 1.0)).tolist()]
    [0.75, 0.25]
    """
    each = [jax.nn.log_softmax(jnp.maximum(z.astype(jnp.float32) / temperature, LOWEST), axis=-1) for z in logits]
    chosen = [(w, p) for w, p in zip(shares, each, strict=True) if w]
    return temperature * jax.nn.logsumexp(jnp.stack([p + jnp.log(w) for w, p in chosen]), axis=0)


# -- the top k answers of a teacher that is not here ------------------------------------------------------------------


def top_answers(logits: jax.Array, k: int, temperatures: Sequence[float]) -> dict[str, jax.Array]:
    """What a cache keeps of a teacher's logits `[..., classes]`.

    Returns:
      `ids` int32 `[..., k]` of the largest logits; `logits` float32 `[..., k]`, those less the logsumexp of all (so
      that float16 is most precise where it matters); `logsumexp` float32 `[..., temperatures]` of all logits over each
      temperature, the first of which is 1.
    """
    logits = jnp.maximum(logits.astype(jnp.float32), LOWEST)
    largest, ids = jax.lax.top_k(logits, k)
    scales = jnp.stack([jax.nn.logsumexp(logits / t, axis=-1) for t in temperatures], axis=-1)
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return {"ids": ids.astype(jnp.int32), "logits": largest - whole, "logsumexp": scales}


def top_response(
    answers: dict[str, jax.Array],
    student_logits: jax.Array,
    valid: jax.Array,
    temperatures: Sequence[float],
    temperature: float = 2.0,
    divergence: Divergence = forward_kl,
    weights: jax.Array | None = None,
) -> Term:
    """As `response`, of k tokens each by itself and all others as one: `k + 1` probabilities on both sides.

    With `p_i = exp(t_i/T - logsumexp(t/T))` the other tokens have `1 - Σ_k p_i`, and the student's have what its logits
    give them. To normalise over the k instead would leave the student free to put any mass elsewhere.

    Args:
      answers: of `top_answers`; k equal to the number of classes leaves no others.
      student_logits: float `[..., classes]`.
      valid: bool `[...]`.
      temperatures: those of `answers["logsumexp"]`; the first is 1, and `temperature` is among them.
    """
    ids = jnp.where(valid[..., None], answers["ids"], 0)
    known = lambda a: jnp.where(valid[..., None], a.astype(jnp.float32), 0.0)  # noqa: E731
    scale = known(answers["logsumexp"])
    at, whole = scale[..., temperatures.index(temperature), None], scale[..., 0, None]
    teacher = jnp.maximum((known(answers["logits"]) + whole) / temperature - at, LOWEST)
    student = log_probabilities(student_logits, valid, temperature)
    own = jnp.take_along_axis(student, ids, axis=-1)
    if ids.shape[-1] < student.shape[-1]:
        rest = jnp.maximum(1.0 - jnp.sum(jnp.exp(teacher), axis=-1, keepdims=True), 1e-30)
        others = jnp.put_along_axis(student, ids, LOWEST, axis=-1, inplace=False)
        own = jnp.concatenate([own, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)
        teacher = jnp.concatenate([teacher, jnp.log(rest)], axis=-1)
    each = divergence(jax.lax.stop_gradient(teacher), own)
    return weighed(temperature**2 * each, valid, weights)
