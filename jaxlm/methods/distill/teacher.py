"""Teachers, and what is learned from each of them: a lesson."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxlm.core import Tap, Tree, nearest
from jaxlm.losses.attention import MEASURES, HeadPairs, check_heads
from jaxlm.losses.divergence import Divergence, divergence_of
from jaxlm.methods.distill.layer_map import LayerPairs, layer_map

RELATIONS = ("query", "key", "value")
PROJECTIONS = ("shared", "layer")


class Teacher(NamedTuple):
    """A model to learn from.

    Attributes:
      forward: `(params, batch, taps) -> outputs`, deterministic.
      params: whatever leaves they have, rounded ones too; run view.
      num_layers, hidden_size: its sizes.
      classes: how many outputs teacher and student share, where one has more (rows of a table beyond the tokenizer's
        last token); `None` where they have the same.
    """

    forward: Callable[..., dict[str, Any]]
    params: Tree
    num_layers: int
    hidden_size: int
    classes: int | None = None


class CachedTeacher(NamedTuple):
    """A teacher whose answers are columns of the batch.

    Attributes:
      name: the columns are `{name}_ids`, `{name}_logits` and `{name}_logsumexp`, as `top_answers` makes them.
      temperatures: those that it answered at; the first is 1.
      classes: number of outputs among which its answers are.
    """

    name: str
    temperatures: tuple[float, ...]
    classes: int

    def answers(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Its answers to a batch."""
        return {part: batch[f"{self.name}_{part}"] for part in ("ids", "logits", "logsumexp")}


@dataclass(frozen=True)
class Lesson:
    """What is learned from one teacher; a coefficient of 0 leaves a term out.

    Attributes:
      teacher: to learn from.
      weight: its share among several teachers, by default an equal one.
      temperature: softens both sides' answers.
      divergence: `forward` = KL(teacher‖student), `reverse` = KL(student‖teacher), `jsd`; beta: weighs the halves of
        `jsd`, 0.5 by default.
      hidden: coefficient of the hidden states, `‖t - P s‖²` a dimension.
      layers: map of hidden states and attention: `uniform`, `last`, `final`, or pairs (student's, teacher's), 0 being
        the embeddings (which have no attention) and i the i-th layer.
      projection: P, `shared` by all pairs (none where widths are equal), or one a `layer` pair.
      attention: coefficient of the attention; attention_on: `probabilities` (KL) or `scores` (mean square); heads:
        `match`, `mean` or pairs (student's, teacher's), see `attention_distance`.
      relations: coefficient of the relations of `relation_of` (MiniLMv2); relation_layers: their layer map;
        relation_heads: how many, by default as many as leave each of them a width of 8.
      sample_weight: column of the batch that weighs its samples (or tokens) in all of these terms.
    """

    teacher: Teacher | CachedTeacher
    weight: float | None = None
    temperature: float = 2.0
    divergence: str = "forward"
    beta: float | None = None
    hidden: float = 0.0
    layers: str | LayerPairs = "uniform"
    projection: str = "shared"
    attention: float = 0.0
    attention_on: str = "probabilities"
    heads: str | HeadPairs = "match"
    relations: float = 0.0
    relation_of: Sequence[str] = RELATIONS
    relation_layers: str | LayerPairs = "final"
    relation_heads: int | None = None
    sample_weight: str | None = None

    def __post_init__(self):
        divergence_of(self.divergence, self.beta)
        if not isinstance(self.heads, str):
            object.__setattr__(self, "heads", tuple((s, t) for s, t in self.heads))
        if self.temperature <= 0:
            raise ValueError(f"distill: temperature must be positive, not {self.temperature}")
        for name in ("weight", "hidden", "attention", "relations"):
            if (getattr(self, name) or 0.0) < 0:
                raise ValueError(f"distill: {name} must not be negative, not {getattr(self, name)}")
        for name, known in (("projection", PROJECTIONS), ("attention_on", MEASURES)):
            if getattr(self, name) not in known:
                raise ValueError(f"distill: {name} {getattr(self, name)!r}; {nearest(getattr(self, name), known)}")
        for name in self.relation_of:
            if name not in RELATIONS:
                raise ValueError(f"distill: relations of {name!r}; {nearest(name, RELATIONS)}")
        if isinstance(self.heads, str):
            check_heads(self.heads, 0, 0)
        if isinstance(self.teacher, CachedTeacher):
            if self.inner:
                raise ValueError(
                    "distill: a cache holds a teacher's answers only; leave out cache, or hidden, "
                    "attention and relations"
                )
            if self.temperature not in self.teacher.temperatures:
                known = ", ".join(map(str, self.teacher.temperatures))
                raise ValueError(
                    f"distill: the cache holds answers at the temperatures {known}, not {self.temperature}; take "
                    "one of them, or write another cache"
                )

    @property
    def live(self) -> Teacher | None:
        """The teacher, if it is here."""
        return None if isinstance(self.teacher, CachedTeacher) else self.teacher

    @property
    def inner(self) -> bool:
        """Whether it is about more than answers."""
        return bool(self.hidden or self.attention or self.relations)

    @property
    def measure(self) -> Divergence:
        return divergence_of(self.divergence, self.beta)

    def plan(self, student_layers: int) -> "Plan":
        """Which layers it compares."""
        teacher = self.live
        if teacher is None:
            return Plan((), (), (), ())
        pairs = lambda kind: layer_map(student_layers, teacher.num_layers, kind)  # noqa: E731
        hidden = pairs(self.layers) if self.hidden else ()
        attention = tuple((s, t) for s, t in pairs(self.layers) if s and t) if self.attention else ()
        relations = tuple((s, t) for s, t in pairs(self.relation_layers) if s and t) if self.relations else ()
        for name, found in (("attention", attention), ("relations", relations)):
            if getattr(self, name) and not found:
                raise ValueError(f"distill: embeddings have no {name}; pair layers, which count from 1")
        return Plan(hidden, attention, relations, tuple(self.relation_of))


class Plan(NamedTuple):
    """The pairs `(student, teacher)` of depths that a lesson compares, by kind."""

    hidden: LayerPairs
    attention: LayerPairs
    relations: LayerPairs
    relation_of: tuple[str, ...]

    def taps(self, side: int) -> frozenset[Tap]:
        """The activations that it reads of the student (side 0) or of the teacher (side 1)."""
        found = {Tap("hidden", pair[side]) for pair in self.hidden}
        found |= {Tap("scores", pair[side] - 1) for pair in self.attention}
        found |= {Tap(site, pair[side] - 1) for pair in self.relations for site in self.relation_of}
        return frozenset(found)


def shares(lessons: Sequence[Lesson]) -> tuple[float, ...]:
    """The teachers' weights, which sum to 1: those given, or equal ones.

    Raises:
      ValueError: when only some are given, or they sum to something else.
    """
    if not lessons:
        raise ValueError("distill: there is nothing to learn from; name a teacher")
    given = [lesson.weight for lesson in lessons if lesson.weight is not None]
    if not given:
        return (1.0 / len(lessons),) * len(lessons)
    if len(given) < len(lessons):
        raise ValueError(
            f"distill: {len(given)} of {len(lessons)} teachers have a weight; give all of them one, or none"
        )
    if not math.isclose(sum(given), 1.0, abs_tol=1e-6):
        raise ValueError(f"distill: the teachers' weights {', '.join(map(str, given))} sum to {sum(given):g}, not to 1")
    return tuple(given)
