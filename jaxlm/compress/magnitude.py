"""Unstructured magnitude pruning during training."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.compress.schedule import cubic
from jaxlm.core import Adapted, Masked, Method, Step, Tree, flatten, map_leaves, matches, materialize
from jaxlm.core.paths import join_field


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

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        if not any(matches(targets, path) for path in flatten(params)):
            raise ValueError(f"magnitude: targets {targets!r} match no parameter")
        wrap = lambda leaf: Masked(leaf, jnp.ones(leaf.shape, bool))  # noqa: E731
        return Adapted(map_leaves(lambda path, leaf: wrap(leaf) if matches(targets, path) else leaf, params), axes)

    def update(step: Step, grads: dict, constants: dict, number: jax.Array) -> Step:
        now = cubic(number, sparsity, begin, end)
        due = (number >= begin) & (((number - begin) % every == 0) | (number == end)) & (number <= end)
        masks = {}

        def refresh(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, Masked):
                return leaf
            score = jnp.abs(materialize(leaf.base))
            choose = jax.vmap(keep_largest, in_axes=(0, None)) if score.ndim == 3 else keep_largest
            mask = jax.lax.cond(due, lambda: choose(score, now), lambda: leaf.mask)
            if isinstance(leaf.base, jax.Array):
                masks[join_field(path, "base")] = mask
                leaf = leaf.replace(base=jnp.where(mask, leaf.base, 0))
            return leaf.replace(mask=mask)

        params = map_leaves(refresh, step.params)
        moments = [
            {name: jnp.where(masks[name], m, 0) if name in masks else m for name, m in tree.items()}
            for tree in step.moments
        ]
        return Step(params, moments, step.state)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        plain = map_leaves(lambda path, leaf: materialize(leaf) if isinstance(leaf, Masked) else leaf, params)
        return model, plain, axes

    def claims(params: Tree) -> set[tuple[str, str]]:
        return {(path, "sparsity") for path in flatten(params) if matches(targets, path)}

    return Method(init=init, update=update, bake=bake, claims=claims)
