"""Unstructured magnitude pruning during training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.compress.schedule import check_schedule, cubic, due
from jaxlm.core import (
    Adapted,
    FakeQuant,
    Masked,
    Method,
    Node,
    Step,
    Tree,
    canonical_path,
    flatten,
    map_leaves,
    matches,
    materialize,
)


def keep_largest(scores: jax.Array, sparsity: jax.Array | float) -> jax.Array:
    """The mask that drops exactly `round(sparsity · n)` entries, those with the smallest scores.

    Counting instead of comparing with a threshold keeps the number exact where scores are equal (the first of equal
    entries go). `scores` is one matrix; the mask has its shape.

    >>> keep_largest(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 0.5).tolist()
    [[True, False], [False, True]]
    """
    order = jnp.argsort(scores.reshape(-1), stable=True)
    rank = jnp.zeros(scores.size, jnp.int32).at[order].set(jnp.arange(scores.size, dtype=jnp.int32))
    dropped = jnp.round(sparsity * scores.size).astype(jnp.int32)
    return (rank >= dropped).reshape(scores.shape)


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


def magnitude(
    *, sparsity: float, begin: int = 0, end: int, every: int = 10, targets: str = r".*layers_\d+/.*/kernel"
) -> Method:
    """Masks the smallest weights of every target, by the cubic schedule from step `begin` to `end`.

    Each matrix keeps its own share. Masked weights and their optimizer moments are set to zero after every update, so
    that neither momentum nor decay moves what the forward pass does not see. Baking stores the zeros in a plain array.

    Args:
      sparsity: final share of zeros, in [0, 1).
      begin, end: first and last step of the schedule; every: steps between two new masks.
      targets: regex over paths.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"magnitude: sparsity must be in [0, 1), not {sparsity}")
    check_schedule("magnitude", begin, end, every)

    def chosen(path: str) -> bool:
        return matches(targets, canonical_path(path))

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        if not any(map(chosen, flatten(params))):
            raise ValueError(f"magnitude: targets {targets!r} match no parameter")
        return Adapted(map_leaves(lambda path, leaf: with_mask(leaf) if chosen(path) else leaf, params), axes)

    def update(step: Step, grads: dict, constants: dict, number: jax.Array) -> Step:
        now, renew = cubic(number, sparsity, begin, end), due(number, begin, end, every)
        masks = {}

        def refresh(name: str, leaf: Masked) -> Masked:
            choose = jax.vmap(keep_largest, in_axes=(0, None)) if leaf.mask.ndim == 3 else keep_largest
            mask = jax.lax.cond(renew, lambda: choose(jnp.abs(materialize(leaf.base)), now), lambda: leaf.mask)
            if isinstance(leaf.base, jax.Array):
                masks[f"{name}.base"] = mask
                leaf = leaf.replace(base=jnp.where(mask, leaf.base, 0))
            return leaf.replace(mask=mask)

        params = map_leaves(lambda path, leaf: at_mask(refresh, path, leaf) if chosen(path) else leaf, step.params)
        moments = [
            {name: jnp.where(masks[name], m, 0) if name in masks else m for name, m in tree.items()}
            for tree in step.moments
        ]
        return Step(params, moments, step.state)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        plain = lambda path, leaf: at_mask(lambda _, masked: materialize(masked), path, leaf)  # noqa: E731
        return model, map_leaves(lambda path, leaf: plain(path, leaf) if chosen(path) else leaf, params), axes

    def claims(params: Tree) -> set[tuple[str, str]]:
        return {(path, "sparsity") for path in flatten(params) if chosen(path)}

    return Method(init=init, update=update, bake=bake, claims=claims)
