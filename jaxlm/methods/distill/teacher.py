"""Teachers, and what is distilled from each of them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from jaxlm.core import Tap, Tree, nearest
from jaxlm.losses.attention import MEASURES, HeadPairs, check_heads
from jaxlm.losses.divergence import Divergence, divergence_of
from jaxlm.methods.distill.layer_map import LayerPairs, layer_map

RELATIONS = ("query", "key", "value")
PROJECTIONS = ("shared", "layer")


class TeacherForward(Protocol):
    """A teacher's forward pass."""

    def __call__(self, params: Tree, batch: Mapping[str, jax.Array], taps: Collection[Tap], /) -> dict[str, Any]:
        """Its deterministic outputs: `logits [batch, (length,) classes]`, and `taps` where it was asked for some."""


class Teacher(NamedTuple):
    """A model to learn from.

    Attributes:
      forward: its forward pass.
      params: whatever leaves they have, quantized ones too; run view.
      num_layers, hidden_size: its sizes.
      classes: how many outputs teacher and student share, where one has more (rows of a table beyond the tokenizer's
        last token); `None` where they have the same.
    """

    forward: TeacherForward
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
class DistillConfig:
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
      relations: coefficient of the relations (MiniLMv2); relation_of: what is related to itself, of `query`, `key`
        and `value`; relation_layers: layer map of the relations; relation_heads: how many heads they have, by default
        as many as leave each of them a width of 8.
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
        for name, valid in (("projection", PROJECTIONS), ("attention_on", MEASURES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"distill: {name} {getattr(self, name)!r}; {nearest(getattr(self, name), valid)}")
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
                cached = ", ".join(map(str, self.teacher.temperatures))
                raise ValueError(
                    f"distill: the cache holds answers at the temperatures {cached}, not {self.temperature}; take "
                    "one of them, or write another cache"
                )

    @property
    def live(self) -> Teacher | None:
        """The teacher, if it is in memory and not in a cache."""
        return None if isinstance(self.teacher, CachedTeacher) else self.teacher

    @property
    def inner(self) -> bool:
        """Whether it is about more than answers."""
        return bool(self.hidden or self.attention or self.relations)

    @property
    def measure(self) -> Divergence:
        """The divergence of answers."""
        return divergence_of(self.divergence, self.beta)

    def pairing(self, student_layers: int) -> "LayerPairing":
        """Which layers it compares."""
        teacher = self.live
        if teacher is None:
            return LayerPairing((), (), (), ())
        pairs = lambda kind: layer_map(student_layers, teacher.num_layers, kind)  # noqa: E731
        hidden = pairs(self.layers) if self.hidden else ()
        attention = tuple((s, t) for s, t in pairs(self.layers) if s and t) if self.attention else ()
        relations = tuple((s, t) for s, t in pairs(self.relation_layers) if s and t) if self.relations else ()
        for name, pairs_of_kind in (("attention", attention), ("relations", relations)):
            if getattr(self, name) and not pairs_of_kind:
                raise ValueError(f"distill: embeddings have no {name}; pair layers, which count from 1")
        return LayerPairing(hidden, attention, relations, tuple(self.relation_of))


class LayerPairing(NamedTuple):
    """The pairs `(student, teacher)` of depths that are compared, by kind."""

    hidden: LayerPairs
    attention: LayerPairs
    relations: LayerPairs
    relation_of: tuple[str, ...]

    def taps(self, side: int) -> frozenset[Tap]:
        """The activations that it reads of the student (side 0) or of the teacher (side 1)."""
        hidden = {Tap("hidden", pair[side]) for pair in self.hidden}
        attention = {Tap("scores", pair[side] - 1) for pair in self.attention}
        relations = {Tap(site, pair[side] - 1) for pair in self.relations for site in self.relation_of}
        return frozenset(hidden | attention | relations)


def shares(configs: Sequence[DistillConfig]) -> tuple[float, ...]:
    """The teachers' weights, which sum to 1: those given, or equal ones.

    Raises:
      ValueError: when only some are given, or they sum to something else.
    """
    if not configs:
        raise ValueError("distill: there is nothing to learn from; name a teacher")
    weights = [config.weight for config in configs if config.weight is not None]
    if not weights:
        return (1.0 / len(configs),) * len(configs)
    if len(weights) < len(configs):
        raise ValueError(
            f"distill: {len(weights)} of {len(configs)} teachers have a weight; give all of them one, or none"
        )
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        listed = ", ".join(map(str, weights))
        raise ValueError(f"distill: the teachers' weights {listed} sum to {sum(weights):g}, not to 1")
    return tuple(weights)
