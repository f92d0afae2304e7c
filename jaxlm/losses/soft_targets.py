"""Distilling output distributions over classes or tokens: of one teacher, of several, or the top k of a cache."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Shaped

from jaxlm.core import Term
from jaxlm.losses.divergence import LOWEST, Divergence, forward_kl, log_probabilities
from jaxlm.losses.weighting import SampleWeights, weighted_term


def response(
    teacher_logits: Float[Array, "*batch classes"],
    student_logits: Float[Array, "*batch classes"],
    valid: Bool[Array, "*batch"],
    temperature: float = 2.0,
    divergence: Divergence = forward_kl,
    weights: SampleWeights | None = None,
) -> Term:
    """`T² Σ_valid w D(softmax(t/T), softmax(s/T))` and `Σ_valid w`.

    The factor `T²` keeps the gradient's size independent of the temperature: softened probabilities change `1/T` as
    fast, twice. Source: Hinton et al. 2015, arXiv:1503.02531.

    Args:
      teacher_logits: are not differentiated.
      valid: logits elsewhere may be anything, NaN too.

    >>> logits = jnp.array([[0.0, 1.0]])
    >>> float(response(logits, logits, jnp.array([True])).sum)
    0.0
    """
    teacher = log_probabilities(jax.lax.stop_gradient(teacher_logits), valid, temperature)
    distance = divergence(teacher, log_probabilities(student_logits, valid, temperature))
    return weighted_term(temperature**2 * distance, valid, weights)


def mean_logits(
    logits: Sequence[Float[Array, "*batch classes"]], shares: Sequence[float]
) -> Float32[Array, "*batch classes"]:
    """`Σ w_i z_i`: after normalisation the geometric mean of the teachers' distributions.

    A class that one of them excludes (-inf) stays excluded.

    >>> mean_logits([jnp.array([0.0, 2.0]), jnp.array([4.0, 2.0])], [0.25, 0.75]).tolist()
    [3.0, 2.0]
    """
    weighted = [w * jnp.maximum(z.astype(jnp.float32), LOWEST) for w, z in zip(shares, logits, strict=True)]
    return jnp.sum(jnp.stack(weighted), axis=0)


def mixture_logits(
    logits: Sequence[Float[Array, "*batch classes"]], shares: Sequence[float], temperature: float
) -> Float32[Array, "*batch classes"]:
    """`T log Σ w_i softmax(z_i / T)`: logits whose distribution at temperature T is the mean of the teachers'.

    >>> uniform, peaked = jnp.zeros(2), jnp.array([0.0, -50.0])
    >>> [round(p, 4) for p in jnp.exp(mixture_logits([uniform, peaked], [0.5, 0.5], 1.0)).tolist()]
    [0.75, 0.25]
    """
    log_p = [jax.nn.log_softmax(jnp.maximum(z.astype(jnp.float32) / temperature, LOWEST), axis=-1) for z in logits]
    weighted = [p + jnp.log(w) for w, p in zip(shares, log_p, strict=True) if w]
    return temperature * jax.nn.logsumexp(jnp.stack(weighted), axis=0)


# -- the top k logits of a teacher, from a cache ----------------------------------------------------------------------


def top_answers(
    logits: Float[Array, "*batch classes"], k: int, temperatures: Sequence[float]
) -> dict[str, Shaped[Array, "*batch _"]]:
    """What a cache keeps of a teacher's logits.

    Returns:
      `ids` int32 `[..., k]` of the largest logits; `logits` float32 `[..., k]`, those less the logsumexp of all (so
      that float16 is most precise where it matters); `logsumexp` float32 `[..., temperatures]` of all logits over each
      temperature, the first of which is 1.
    """
    logits = jnp.maximum(logits.astype(jnp.float32), LOWEST)
    largest, ids = jax.lax.top_k(logits, k)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    normalizers = jnp.stack([jax.nn.logsumexp(logits / t, axis=-1) for t in temperatures], axis=-1)
    return {"ids": ids.astype(jnp.int32), "logits": largest - normalizer, "logsumexp": normalizers}


def top_response(
    answers: Mapping[str, Shaped[Array, "*batch _"]],
    student_logits: Float[Array, "*batch classes"],
    valid: Bool[Array, "*batch"],
    temperatures: Sequence[float],
    temperature: float = 2.0,
    divergence: Divergence = forward_kl,
    weights: SampleWeights | None = None,
) -> Term:
    """As `response`, of the k tokens and of all others together: `k + 1` probabilities on both sides.

    With `p_i = exp(t_i/T - logsumexp(t/T))` the others have `1 - Σ_k p_i` of the teacher, and of the student the sum of
    its probabilities. Normalising over the k instead would leave the student free to put any mass on the others.

    Args:
      answers: of `top_answers`; k equal to the number of classes leaves no others.
      temperatures: those of `answers["logsumexp"]`; the first is 1, and `temperature` is among them.
    """
    ids = jnp.where(valid[..., None], answers["ids"], 0)
    masked = lambda a: jnp.where(valid[..., None], a.astype(jnp.float32), 0.0)  # noqa: E731
    normalizers = masked(answers["logsumexp"])
    normalizer, softened = normalizers[..., 0, None], normalizers[..., temperatures.index(temperature), None]
    teacher = jnp.maximum((masked(answers["logits"]) + normalizer) / temperature - softened, LOWEST)
    log_p = log_probabilities(student_logits, valid, temperature)
    student = jnp.take_along_axis(log_p, ids, axis=-1)
    if ids.shape[-1] < log_p.shape[-1]:
        teacher_rest = jnp.maximum(1.0 - jnp.sum(jnp.exp(teacher), axis=-1, keepdims=True), 1e-30)
        student_others = jnp.put_along_axis(log_p, ids, LOWEST, axis=-1, inplace=False)
        student_rest = jax.nn.logsumexp(student_others, axis=-1, keepdims=True)
        teacher = jnp.concatenate([teacher, jnp.log(teacher_rest)], axis=-1)
        student = jnp.concatenate([student, student_rest], axis=-1)
    distance = divergence(jax.lax.stop_gradient(teacher), student)
    return weighted_term(temperature**2 * distance, valid, weights)
