"""Unstructured pruning while training goes on: schedule, masks, zeros. Methods differ in their scores alone.

Every target is a Masked weight. At the steps of a schedule new masks are chosen; after every update what they hide is
zero, in the weights and in the optimizer's moments, so that neither momentum nor decay moves what the forward pass does
not see.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import (
    SEGMENT,
    Adapted,
    FakeQuant,
    Masked,
    Method,
    Node,
    Scored,
    Step,
    Tree,
    first_match,
    flatten,
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

Share = float | Sequence[tuple[str, float]] | None


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
        for share in [share for _, share in self.rules] or [self.one]:
            final_sparsity(share, self.pattern, self.who)

    @property
    def rules(self) -> Sequence[tuple[str, float]]:
        """The sparsity as rules, if it is given so."""
        return () if isinstance(self.sparsity, float | int | None) else self.sparsity

    @property
    def one(self) -> float | None:
        """The sparsity as one number, if it is given so."""
        return self.sparsity if isinstance(self.sparsity, float | int | None) else None

    def chosen(self, path: str) -> bool:
        """Whether a leaf of either view is a target: in the run view, any of its layers."""
        return any(matches(self.targets, own) for own in layer_paths(path))

    def share(self, path: str) -> float:
        """Final share of zeros of a leaf of the canonical view; NaN for one that is no target."""
        if not matches(self.targets, path):
            return float("nan")
        if not self.rules:
            return final_sparsity(self.one, self.pattern, self.who)
        own = first_match(self.rules, path)
        if own is None:
            raise ValueError(f"{self.who}: no sparsity rule matches {path!r}; add one, or narrow targets")
        return final_sparsity(own, self.pattern, self.who)

    def shares(self, path: str) -> float | np.ndarray:
        """`share` of a leaf of either view: for stacked layers one a layer, `[layers]`."""
        each = [self.share(own) for own in layer_paths(path)]
        return np.array(each, np.float32) if re.search(SEGMENT, path) else each[0]

    def check(self, params: Tree) -> None:
        """Raises ValueError where targets or rules name nothing, or the pattern does not fit."""
        flat = {path: leaf for path, leaf in flatten(params).items() if self.chosen(path)}
        if not flat:
            raise ValueError(f"{self.who}: targets {self.targets!r} match no parameter")
        for pattern, _ in self.rules:
            if not any(matches(pattern, path) for path in flat):
                raise ValueError(f"{self.who}: the sparsity rule {pattern!r} matches no target")
        for path, leaf in flat.items():
            self.share(path)
            check_shape(leaf.shape, self.pattern, f"{self.who}: {path}")

    def masks(self, candidates: Mapping[str, "Candidate"], scores: Mapping[str, jax.Array], now: Any) -> dict:
        """The masks of largest scores by name; `now` turns a final share into the present one."""
        if self.per == "model":
            strangers = [own for c in candidates.values() for own in layer_paths(c.path) if np.isnan(self.share(own))]
            if strangers:
                raise ValueError(f"{self.who}: {strangers[0]} is stacked with targets and masked, but no target itself")
            return keep_together(scores, now(self.one), self.pattern)
        choose = partial(keep, pattern=self.pattern, per=self.per)
        return {
            name: by_layer(choose, scores[name].ndim)(scores[name], now(self.shares(candidate.path)))
            for name, candidate in candidates.items()
        }


def layer_paths(path: str) -> list[str]:
    """Canonical paths of a leaf of either view: those of all its layers, where it stands for several.

    >>> layer_paths("layers_3-4/mlp/up/kernel")
    ['layers_3/mlp/up/kernel', 'layers_4/mlp/up/kernel']
    """
    found = re.search(r"layers_(\d+)-(\d+)", path)
    if found is None:
        return [path]
    return [re.sub(SEGMENT, f"layers_{i}", path) for i in range(int(found[1]), int(found[2]) + 1)]


def by_layer(function: Callable, ndim: int) -> Callable:
    """`function` of matrices and shares, over the layers of stacked ones."""
    return jax.vmap(function) if ndim == 3 else function


class Candidate(NamedTuple):
    """A target when masks are chosen.

    Attributes:
      path: of the leaf; leaf: the Masked in it, updated; gradient: of its base, `None` where the method reads none.
    """

    path: str
    leaf: Any
    gradient: Any


Choose = Callable[[dict[str, Candidate], jax.Array], dict[str, jax.Array]]
"""`(candidates by name, step number) -> new masks by name`."""


def by_score(plan: Plan, score: Callable[[Any], jax.Array], back: bool = False) -> Choose:
    """Keeps the largest scores, by the cubic schedule.

    Args:
      score: what an entry of a Masked is worth, in the shape of its mask.
      back: whether an entry that was masked may come back; otherwise its score does not matter.
    """

    def choose(candidates: dict[str, Candidate], number: jax.Array) -> dict[str, jax.Array]:
        old = {name: c.leaf.mask for name, c in candidates.items()}
        scores = {name: score(c.leaf).astype(jnp.float32) for name, c in candidates.items()}
        if not back:
            scores = {name: jnp.where(old[name], s, -jnp.inf) for name, s in scores.items()}
        new = plan.masks(candidates, scores, lambda final: cubic(number, final, plan.begin, plan.end))
        return new if back else {name: mask & old[name] for name, mask in new.items()}

    return choose


def pruning(
    plan: Plan,
    choose: Choose,
    *,
    learn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    dense: bool = False,
    hold: bool = False,
) -> Method:
    """A method of unstructured pruning.

    Args:
      plan: how much, where and when.
      choose: picks the masks.
      learn: `(scores, weight, its gradient) -> scores`, after every step; targets are then Scored, scores 0 at first.
      dense: `learn` and `choose` read the gradients of masked entries, too. The optimizer never sees these.
      hold: masked weights keep the value that they had instead of becoming zero; what the forward pass sees is zero.
    """
    reads = learn is not None or dense

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        plan.check(params)

        def wrap(path: str, leaf: Any) -> Any:
            if not plan.chosen(path):
                return leaf
            if reads and not isinstance(matrix_of(leaf), jax.Array):
                kind = type(matrix_of(leaf)).__name__
                raise ValueError(
                    f"{plan.who}: {path} holds a {kind}, and the gradient of its matrix is not known; bake it first, "
                    "leave it out of targets, or prune by magnitude"
                )
            prepare: Callable[[str, Masked], Any] = lambda _, own: _prepared(own, learn is not None, dense)  # noqa: E731
            return at_mask(prepare, path, with_mask(leaf))

        return Adapted(map_leaves(wrap, params), axes, {}, {plan.who: {"renewed": jnp.int32(0)}})

    def targets(params: Tree) -> dict[str, tuple[str, Masked]]:
        """`{name of the Masked: (path of the leaf, it)}`."""
        found: dict[str, tuple[str, Masked]] = {}
        for path, leaf in flatten(params).items():
            own = masked_in(path, leaf) if plan.chosen(path) else None
            if own is not None:
                found[own[0]] = (path, own[1])
        return found

    def mask(params: Tree, grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if not dense:
            return grads
        hidden = {f"{name}.base": leaf.mask for name, (_, leaf) in targets(params).items()}
        return {name: jnp.where(hidden[name], g, 0) if name in hidden else g for name, g in grads.items()}

    def update(step: Step, grads: dict, constants: dict, number: jax.Array) -> Step:
        before: dict[str, Any] = {}
        if learn or hold:
            before = {name: leaf.base for name, (_, leaf) in targets(step.previous).items()}
        candidates: dict[str, Candidate] = {}
        leaf: Any
        for name, (path, leaf) in targets(step.params).items():
            gradient: Any = None
            if reads:
                if f"{name}.base" not in grads:
                    raise ValueError(f"{plan.who}: {path} does not train, so there is no gradient to score it by")
                gradient = grads[f"{name}.base"]
            if learn is not None:
                leaf = leaf.replace(scores=learn(leaf.scores, before[name], gradient))
            if hold:
                leaf = leaf.replace(base=jnp.where(leaf.mask, leaf.base, before[name]))
            candidates[name] = Candidate(path, leaf, gradient)

        def renewed() -> dict[str, jax.Array]:
            new = choose(candidates, number)
            return {name: _where_targeted(plan, c, new[name]) for name, c in candidates.items()}

        last = step.state[plan.who]["renewed"]
        due = overdue(number, last, plan.begin, plan.end, plan.every)
        masks = jax.lax.cond(due, renewed, lambda: {name: c.leaf.mask for name, c in candidates.items()})

        done: dict[str, Masked] = {}
        visible: dict[str, jax.Array] = {}
        for name, (_, leaf, _) in candidates.items():
            leaf = leaf.replace(mask=masks[name])
            if isinstance(leaf.base, jax.Array):
                visible[f"{name}.base"] = masks[name]
                leaf = leaf if hold else leaf.replace(base=jnp.where(leaf.mask, leaf.base, 0))
            done[name] = leaf
        params = map_leaves(
            lambda path, leaf: at_mask(lambda name, _: done[name], path, leaf) if plan.chosen(path) else leaf,
            step.params,
        )
        moments = [
            {name: jnp.where(visible[name], m, 0) if name in visible else m for name, m in tree.items()}
            for tree in step.moments
        ]
        state = {**step.state, plan.who: {"renewed": jnp.where(due, number, last)}}
        return step._replace(params=params, moments=moments, state=state)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        plain = lambda path, leaf: at_mask(lambda _, own: materialize(own), path, leaf)  # noqa: E731
        return model, map_leaves(lambda path, leaf: plain(path, leaf) if plan.chosen(path) else leaf, params), axes

    def claims(params: Tree) -> set[tuple[str, str]]:
        aspects = ("sparsity", "update") if reads else ("sparsity",)
        return {(path, aspect) for path in flatten(params) if plan.chosen(path) for aspect in aspects}

    return Method(init=init, mask=mask, update=update, bake=bake, claims=claims)


def prune_at_once(plan: Plan, score: Callable[[Any], jax.Array], params: Tree) -> dict[str, Any]:
    """The parameters (canonical view) with every target masked, and zero where it is: what a surgery does.

    Zeros then survive training without a method: their gradient is zero, and so are moments and decay.
    """
    plan.check(params)
    leaves = {path: with_mask(leaf) for path, leaf in flatten(params).items() if plan.chosen(path)}
    found = {path: masked_in(path, leaf) for path, leaf in leaves.items()}
    candidates = {own[0]: Candidate(path, own[1], None) for path, own in found.items() if own is not None}
    masks = by_score(plan, score)(candidates, jnp.int32(plan.end))

    def closed(name: str, leaf: Masked) -> Masked:
        leaf = leaf.replace(mask=masks[name])
        return leaf.replace(base=leaf.materialize()) if isinstance(leaf.base, jax.Array) else leaf

    return map_leaves(lambda path, leaf: at_mask(closed, path, leaves[path]) if path in leaves else leaf, params)


def with_mask(leaf: Any) -> Any:
    """`leaf` under an open mask; one that is there stays. Below a rounding: that keeps zeros, and codes stay codes."""
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
    """What would lie right below a mask: below roundings and a mask that is there."""
    return matrix_of(leaf.base) if isinstance(leaf, FakeQuant | Masked) else leaf


def _prepared(leaf: Masked, scored: bool, dense: bool) -> Masked:
    if scored:
        return Scored(leaf.base, leaf.mask, dense, scores=jnp.zeros(leaf.shape, jnp.float32))
    return leaf.replace(dense_grad=dense) if dense else leaf


def _where_targeted(plan: Plan, candidate: Candidate, new: jax.Array) -> jax.Array:
    """The new mask, the old one for layers of a stack that are no targets."""
    mine = ~np.isnan(plan.shares(candidate.path))
    return new if mine.all() else jnp.where(mine[:, None, None], new, candidate.leaf.mask)
