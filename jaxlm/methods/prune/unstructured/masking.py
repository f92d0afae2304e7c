"""Unstructured pruning while training goes on: schedule, masks, zeros. Methods differ in their scores alone.

Every target is a Masked weight. At the steps of a schedule new masks are chosen; after every update what they hide is
zero, in the weights and in the optimizer's moments, so that neither momentum nor decay moves what the forward pass does
not see.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxlm.core import (
    LM,
    SEGMENT,
    FakeQuant,
    Masked,
    Method,
    MethodInit,
    Node,
    Step,
    Tree,
    first_match,
    flatten,
    is_stacked,
    lookup,
    map_leaves,
    matches,
    materialize,
)
from jaxlm.methods.prune.schedule import check_schedule, cubic, overdue
from jaxlm.methods.prune.unstructured.patterns import (
    PER,
    check_shape,
    final_sparsity,
    keep,
    keep_together,
    parse_pattern,
)
from jaxlm.methods.prune.unstructured.scored import Scored

Share = float | Sequence[tuple[str, float]] | None
"""A share of zeros: one number, rules `((path regex, share), …)`, or `None` under an `N:M` pattern."""


@dataclass(frozen=True)
class Plan:
    """How much is pruned, where and when: the arguments that all methods share.

    Attributes:
      who: name of the method, for messages.
      sparsity: final share of zeros in [0, 1): one number, or rules `((path regex, share), …)` of which the first match
        counts; `None` under `N:M`, which has its own.
      pattern: `unstructured`, `N:M` (N kept of M inputs) or `block:RxC`, see `patterns`.
      per: what the share is counted over: `matrix`, `output` (each column apart) or `model` (all targets together).
      begin, end: first and last step of the schedule, cubic in between and one-shot where they are equal; every: steps
        between two new masks.
      targets: regex over paths.
    """

    who: str
    sparsity: Share
    pattern: str
    per: str
    targets: str
    begin: int = 0
    end: int = 1
    every: int = 1

    def __post_init__(self):
        check_schedule(self.who, self.begin, self.end, self.every)
        lookup(dict.fromkeys(PER), self.per, f"{self.who}: per")
        if self.per == "model" and (parse_pattern(self.pattern).group or self.rules):
            raise ValueError(
                f"{self.who}: per='model' is one budget for all targets; leave out the pattern {self.pattern!r}"
                if not self.rules
                else f"{self.who}: per='model' is one budget for all targets; give one sparsity, not rules"
            )
        for share in [share for _, share in self.rules] or [self.single_share]:
            final_sparsity(share, self.pattern, self.who)

    @property
    def rules(self) -> Sequence[tuple[str, float]]:
        """The sparsity as rules, if it is given so."""
        return () if isinstance(self.sparsity, float | int | None) else self.sparsity

    @property
    def single_share(self) -> float | None:
        """The sparsity as one number, if it is given so."""
        return self.sparsity if isinstance(self.sparsity, float | int | None) else None

    def chosen(self, path: str) -> bool:
        """Whether a leaf of either view is a target: in the run view, any of its layers."""
        return any(matches(self.targets, layer_path) for layer_path in layer_paths(path))

    def share(self, path: str) -> float:
        """Final share of zeros of a leaf of the canonical view; NaN for one that is no target."""
        if not matches(self.targets, path):
            return float("nan")
        if not self.rules:
            return final_sparsity(self.single_share, self.pattern, self.who)
        share = first_match(self.rules, path)
        if share is None:
            raise ValueError(f"{self.who}: no sparsity rule matches {path!r}; add one, or narrow targets")
        return final_sparsity(share, self.pattern, self.who)

    def shares(self, path: str) -> float | Float32[np.ndarray, "layers"]:
        """`share` of a leaf of either view: for stacked layers one a layer."""
        by_path = [self.share(layer_path) for layer_path in layer_paths(path)]
        return np.array(by_path, np.float32) if is_stacked(path) else by_path[0]

    def check(self, params: Tree) -> None:
        """Raises ValueError where targets or rules name nothing, a target is no matrix, or the pattern does not fit.

        Args:
          params: canonical view.
        """
        flat = {path: leaf for path, leaf in flatten(params).items() if self.chosen(path)}
        if not flat:
            raise ValueError(f"{self.who}: targets {self.targets!r} match no parameter")
        for pattern, _ in self.rules:
            if not any(matches(pattern, path) for path in flat):
                raise ValueError(f"{self.who}: the sparsity rule {pattern!r} matches no target")
        for path, leaf in flat.items():
            self.share(path)
            if len(leaf.shape) != 2:
                raise ValueError(
                    f"{self.who}: {path} is no matrix but has the shape {tuple(leaf.shape)}, and masks are chosen in "
                    "matrices; leave it out of targets"
                )
            check_shape(leaf.shape, self.pattern, f"{self.who}: {path}")

    def masks(
        self,
        candidates: Mapping[str, "Candidate"],
        scores: Mapping[str, Float32[Array, "*_ _ _"]],
        present_share: Callable[[Any], Array],
    ) -> dict[str, Array]:
        """The masks of largest scores by name.

        Args:
          present_share: from a final share (or `[layers]` of them) to that of this step.
        """
        if self.per == "model":
            paths = [path for candidate in candidates.values() for path in layer_paths(candidate.path)]
            if no_targets := [path for path in paths if np.isnan(self.share(path))]:
                raise ValueError(
                    f"{self.who}: {no_targets[0]} is stacked with targets and masked, but no target itself"
                )
            return keep_together(scores, present_share(self.single_share), self.pattern)
        mask_of = partial(keep, pattern=self.pattern, per=self.per)
        return {
            name: by_layer(mask_of, candidate.path)(scores[name], present_share(self.shares(candidate.path)))
            for name, candidate in candidates.items()
        }


def layer_paths(path: str) -> list[str]:
    """Canonical paths of a leaf of either view: those of all its layers, where it stands for several.

    >>> layer_paths("layers_3-4/mlp/up/kernel")
    ['layers_3/mlp/up/kernel', 'layers_4/mlp/up/kernel']
    """
    segment = re.search(r"layers_(\d+)-(\d+)", path)
    if segment is None:
        return [path]
    return [re.sub(SEGMENT, f"layers_{i}", path) for i in range(int(segment[1]), int(segment[2]) + 1)]


def by_layer(function: Callable, path: str) -> Callable:
    """`function` of matrices and shares, over the layers of a leaf that is a stack of several."""
    return jax.vmap(function) if is_stacked(path) else function


class Candidate(NamedTuple):
    """A target when masks are chosen.

    Attributes:
      path: of the leaf.
      leaf: the Masked in it, updated.
      gradient: of its base, `[*layers, in, out]`; `None` where the method reads none.
    """

    path: str
    leaf: Any
    gradient: Any


class ChooseMasks(Protocol):
    """Chooses the masks of all targets at a step of the schedule."""

    def __call__(self, candidates: dict[str, Candidate], number: Int[Array, ""], /) -> dict[str, Array]:
        """The masks, bool `[*layers, in, out]`, by the names of the candidates; `number` is that of the step."""


class LearnScores(Protocol):
    """Updates scores after a step."""

    def __call__(
        self,
        scores: Float32[Array, "*layers in out"],
        weight: Float[Array, "*layers in out"],
        gradient: Float[Array, "*layers in out"],
        /,
    ) -> Float32[Array, "*layers in out"]:
        """The scores after it; weight and gradient are those of the matrix before it."""


def by_score(plan: Plan, score: Callable[[Any], Array], may_return: bool = False) -> ChooseMasks:
    """Keeps the largest scores, by the cubic schedule.

    Args:
      score: what an entry of a Masked is worth, in the shape of its mask.
      may_return: whether an entry that was masked may come back; otherwise its score does not matter.
    """

    def choose(candidates: dict[str, Candidate], number: Int[Array, ""]) -> dict[str, Array]:
        kept_before = {name: c.leaf.mask for name, c in candidates.items()}
        scores = {name: score(c.leaf).astype(jnp.float32) for name, c in candidates.items()}
        if not may_return:
            scores = {name: jnp.where(kept_before[name], s, -jnp.inf) for name, s in scores.items()}
        masks = plan.masks(candidates, scores, lambda final: cubic(number, final, plan.begin, plan.end))
        return masks if may_return else {name: mask & kept_before[name] for name, mask in masks.items()}

    return choose


def pruning(
    plan: Plan,
    choose: ChooseMasks,
    *,
    learn: LearnScores | None = None,
    dense: bool = False,
    hold: bool = False,
) -> Method:
    """A method of unstructured pruning.

    Args:
      plan: how much, where and when.
      choose: the masks of a step.
      learn: the scores after every step; targets are then Scored, scores 0 at first.
      dense: `learn` and `choose` read the gradients of masked entries, too. The optimizer never sees these.
      hold: masked weights keep the value that they had instead of becoming zero; what the forward pass sees is zero.
    """
    reads_gradients = learn is not None or dense

    def init(key: jax.Array, lm: LM) -> MethodInit:
        plan.check(lm.params)
        if reads_gradients:
            check_gradients_are_known(plan, lm.params)
        params = prepared(plan, lm.params, scored=learn is not None, dense=dense)
        return MethodInit(lm.replace(params=params), state={plan.who: {"renewed": jnp.int32(0)}})

    def mask(params: Tree, grads: dict[str, Array]) -> dict[str, Array]:
        if not dense:
            return grads
        targets = masked_targets(plan, params)
        return zero_where_masked(grads, {f"{name}.base": leaf.mask for name, (_, leaf) in targets.items()})

    def update(step: Step, grads: dict, constants: dict, number: Int[Array, ""]) -> Step:
        # What the masks are chosen by: the updated weights, and what was learned from their gradients.
        gradients = gradients_of(plan, step.params, grads) if reads_gradients else {}
        candidates = updated_candidates(plan, step, gradients, learn=learn, hold=hold)

        # New masks where the schedule wants some.
        last = step.state[plan.who]["renewed"]
        due = overdue(number, last, plan.begin, plan.end, plan.every)
        masks = jax.lax.cond(
            due,
            lambda: masks_of_targets(plan, candidates, choose(candidates, number)),
            lambda: {name: candidate.leaf.mask for name, candidate in candidates.items()},
        )

        # What they hide is zero, in the weights and in the optimizer's moments.
        leaves = {name: apply_mask(candidate.leaf, masks[name], hold) for name, candidate in candidates.items()}
        params = replace_targets(plan, step.params, lambda name, _: leaves[name])
        mask_of_array = {
            f"{name}.base": masks[name] for name, leaf in leaves.items() if isinstance(leaf.base, jax.Array)
        }
        moments = [zero_where_masked(tree, mask_of_array) for tree in step.moments]
        state = {**step.state, plan.who: {"renewed": jnp.where(due, number, last)}}
        return step._replace(params=params, moments=moments, state=state)

    def bake(lm: LM, state: dict[str, Any]) -> LM:
        return lm.replace(params=replace_targets(plan, lm.params, lambda _, leaf: materialize(leaf)))

    def claims(params: Tree) -> set[tuple[str, str]]:
        aspects = ("sparsity", "update") if reads_gradients else ("sparsity",)
        return {(path, aspect) for path in flatten(params) if plan.chosen(path) for aspect in aspects}

    return Method(init=init, mask=mask, update=update, bake=bake, claims=claims)


# The steps of the method ----------------------------------------------------------------------------------------------


def check_gradients_are_known(plan: Plan, params: Tree) -> None:
    """Raises ValueError for a target whose matrix is no array, so that there is no gradient of it."""
    for path, leaf in flatten(params).items():
        if plan.chosen(path) and not isinstance(matrix_of(leaf), jax.Array):
            raise ValueError(
                f"{plan.who}: {path} holds a {type(matrix_of(leaf)).__name__}, and the gradient of its matrix is not "
                "known; bake it first, leave it out of targets, or prune by magnitude"
            )


def prepared(plan: Plan, params: Tree, *, scored: bool, dense: bool) -> dict[str, Any]:
    """The parameters (canonical view) with every target Masked.

    Args:
      scored: with scores beside the mask, 0 at first.
      dense: with the gradients of masked entries.
    """

    def prepare(_: str, leaf: Masked) -> Masked:
        if scored:
            return Scored(leaf.base, leaf.mask, dense, scores=jnp.zeros(leaf.shape, jnp.float32))
        return leaf.replace(dense_grad=dense) if dense else leaf

    return map_leaves(lambda path, leaf: at_mask(prepare, path, with_mask(leaf)) if plan.chosen(path) else leaf, params)


def masked_targets(plan: Plan, params: Tree) -> dict[str, tuple[str, Any]]:
    """`{name of the Masked: (path of the leaf, it)}` of every target, in either view."""
    targets: dict[str, tuple[str, Any]] = {}
    for path, leaf in flatten(params).items():
        named = masked_in(path, leaf) if plan.chosen(path) else None
        if named is not None:
            targets[named[0]] = (path, named[1])
    return targets


def replace_targets(plan: Plan, params: Tree, change: Callable[[str, Masked], Any]) -> dict[str, Any]:
    """The parameters with `change(name, masked)` in the place of the Masked of every target, in either view."""
    return map_leaves(lambda path, leaf: at_mask(change, path, leaf) if plan.chosen(path) else leaf, params)


def gradients_of(plan: Plan, params: Tree, grads: Mapping[str, Array]) -> dict[str, Array]:
    """The gradient of every target's matrix, by the name of its Masked.

    Raises:
      ValueError: for a target that does not train.
    """
    gradients = {}
    for name, (path, _) in masked_targets(plan, params).items():
        if f"{name}.base" not in grads:
            raise ValueError(f"{plan.who}: {path} does not train, so there is no gradient to score it by")
        gradients[name] = grads[f"{name}.base"]
    return gradients


def updated_candidates(
    plan: Plan, step: Step, gradients: Mapping[str, Array], *, learn: LearnScores | None, hold: bool
) -> dict[str, Candidate]:
    """Every target after the update, by the name of its Masked: its scores learned, what is masked held."""
    before: dict[str, Any] = {}
    if learn is not None or hold:
        before = {name: leaf.base for name, (_, leaf) in masked_targets(plan, step.previous).items()}
    candidates: dict[str, Candidate] = {}
    for name, (path, leaf) in masked_targets(plan, step.params).items():
        if learn is not None:
            leaf = leaf.replace(scores=learn(leaf.scores, before[name], gradients[name]))
        if hold:
            leaf = leaf.replace(base=jnp.where(leaf.mask, leaf.base, before[name]))
        candidates[name] = Candidate(path, leaf, gradients.get(name))
    return candidates


def masks_of_targets(plan: Plan, candidates: Mapping[str, Candidate], masks: Mapping[str, Array]) -> dict[str, Array]:
    """The masks, and the old ones for layers of a stack that are no targets."""

    def of_targets(candidate: Candidate, mask: Bool[Array, "*layers in out"]) -> Bool[Array, "*layers in out"]:
        is_target = ~np.isnan(plan.shares(candidate.path))
        return mask if is_target.all() else jnp.where(is_target[:, None, None], mask, candidate.leaf.mask)

    return {name: of_targets(candidate, masks[name]) for name, candidate in candidates.items()}


def apply_mask(leaf: Any, mask: Bool[Array, "*layers in out"], hold: bool) -> Any:
    """The Masked under a new mask, zero where it masks an array unless the values are held."""
    leaf = leaf.replace(mask=mask)
    if hold or not isinstance(leaf.base, jax.Array):
        return leaf
    return leaf.replace(base=jnp.where(leaf.mask, leaf.base, 0))


def zero_where_masked(arrays: Mapping[str, Array], masks: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays, by name, with zeros where there is a mask of that name and it is false."""
    return {name: jnp.where(masks[name], array, 0) if name in masks else array for name, array in arrays.items()}


def prune_at_once(plan: Plan, score: Callable[[Any], jax.Array], params: Tree) -> dict[str, Any]:
    """The parameters (canonical view) with every target masked, and zero where it is: what a surgery does.

    Zeros then survive training without a method: their gradient is zero, and so are moments and decay.
    """
    plan.check(params)
    params = prepared(plan, params, scored=False, dense=False)
    candidates = {name: Candidate(path, leaf, None) for name, (path, leaf) in masked_targets(plan, params).items()}
    masks = by_score(plan, score)(candidates, jnp.int32(plan.end))

    def close(name: str, leaf: Masked) -> Masked:
        leaf = leaf.replace(mask=masks[name])
        return leaf.replace(base=leaf.materialize()) if isinstance(leaf.base, jax.Array) else leaf

    return replace_targets(plan, params, close)


# Leaves ---------------------------------------------------------------------------------------------------------------


def with_mask(leaf: Any) -> Any:
    """`leaf` under an open mask; one that it has stays. Below a FakeQuant: that keeps zeros, and codes stay codes."""
    if isinstance(leaf, FakeQuant):
        return leaf.replace(base=with_mask(leaf.base))
    return leaf if isinstance(leaf, Masked) else Masked(leaf, jnp.ones(leaf.shape, bool))


def at_mask(change: Callable[[str, Masked], Any], name: str, leaf: Any) -> Any:
    """`leaf` with `change(name, masked)` in the place of the Masked inside it, if there is one."""
    if isinstance(leaf, Masked):
        return change(name, leaf)
    inner = getattr(leaf, "base", None)
    return leaf.replace(base=at_mask(change, f"{name}.base", inner)) if isinstance(inner, Node) else leaf


def masked_in(name: str, leaf: Any) -> tuple[str, Masked] | None:
    """The Masked inside a leaf, with its name, if there is one."""
    if isinstance(leaf, Masked):
        return name, leaf
    inner = getattr(leaf, "base", None)
    return masked_in(f"{name}.base", inner) if isinstance(inner, Node) else None


def matrix_of(leaf: Any) -> Any:
    """What would lie right below a mask: below FakeQuants and a mask that the leaf has."""
    return matrix_of(leaf.base) if isinstance(leaf, FakeQuant | Masked) else leaf
