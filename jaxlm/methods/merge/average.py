"""The weighted mean of parameter trees: averaged checkpoints, model soups."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath, keystr, tree_flatten_with_path


def average(params: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """The weighted mean of several parameter trees, leaf by leaf.

        θ̄ = Σ_j w_j θ_j / Σ_j w_j

    in float32 (or the leaf's own dtype where that is wider), cast back once. Elements that are equal in all trees stay
    as they are, bit for bit: what was frozen stays frozen. Integers, booleans and keys (codes, masks, counters) have no
    mean and must be equal in all trees. The mean is taken of what is stored: factors of a low-rank Weight are averaged
    one by one, and the product of mean factors is not the mean of products, so bake such trees first unless that is
    what you want.

    Args:
      params: one or more pytrees of equal structure, shapes and dtypes.
      weights: one non-negative number a tree, not all zero; equal weights by default.

    Returns:
      A tree of the same structure, shapes and dtypes; its integer leaves are those of the first tree, not copies.

    Raises:
      ValueError: naming the first path whose structure, shape, dtype or integers differ, or bad weights.

    >>> trees = [{"kernel": jnp.array([0.0, 2.0])}, {"kernel": jnp.array([1.0, 4.0])}]
    >>> average(trees)["kernel"].tolist()
    [0.5, 3.0]
    >>> average(trees, weights=[3, 1])["kernel"].tolist()
    [0.25, 2.5]
    """
    if not params:
        raise ValueError("there is nothing to average: params is empty")
    shares = _shares(len(params), weights)
    for number, tree in enumerate(params[1:], 1):
        if difference := _difference(params[0], tree):
            raise ValueError(f"params[{number}] differs from params[0] in structure: {difference}")
    first, structure = tree_flatten_with_path(params[0])
    leaves = zip(*(jax.tree.leaves(tree) for tree in params), strict=True)
    means = [_mean(_name(path), list(of_trees), shares) for (path, _), of_trees in zip(first, leaves, strict=True)]
    return jax.tree.unflatten(structure, means)


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """w_j / Σ_k w_k"""
    numbers = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} weights for {count} trees: give one a tree")
    total = math.fsum(numbers)
    if not (all(weight >= 0 for weight in numbers) and 0 < total < math.inf):
        raise ValueError(f"weights {numbers} are not non-negative finite numbers with a positive sum")
    return [weight / total for weight in numbers]


def _mean(path: str, leaves: list[Any], shares: list[float]) -> jax.Array:
    """The mean of one leaf of all trees, with weights that sum to 1."""
    first, *rest = (jnp.asarray(leaf) for leaf in leaves)
    for number, leaf in enumerate(rest, 1):
        if (first.dtype, first.shape) != (leaf.dtype, leaf.shape):
            raise ValueError(
                f"{path}: params[0] has {first.dtype} {list(first.shape)}, "
                f"params[{number}] has {leaf.dtype} {list(leaf.shape)}"
            )
    same = functools.reduce(jnp.logical_and, (first == leaf for leaf in rest), jnp.array(True))
    if not jnp.issubdtype(first.dtype, jnp.inexact):
        if not bool(same.all()):
            raise ValueError(
                f"{path}: {first.dtype} values differ between the trees and are never averaged; "
                "make them equal, or materialize what they encode first"
            )
        return first
    wide = jnp.promote_types(first.dtype, jnp.float32)
    mean = sum(share * leaf.astype(wide) for share, leaf in zip(shares, [first, *rest], strict=True))
    return jnp.where(same, first, jnp.asarray(mean).astype(first.dtype))


def _difference(a: Any, b: Any, path: KeyPath = ()) -> str | None:
    """The deepest path that explains why two trees differ in structure, and how; None where they do not."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    if structures[0] == structures[1]:
        return None
    if type(a) is not type(b):
        return f"{_name(path)}: {type(a).__name__} against {type(b).__name__}"
    below_a, below_b = _children(a), _children(b)
    if below_a.keys() == below_b.keys():
        below = (_difference(below_a[key], below_b[key], path + key) for key in below_a)
        return next(filter(None, below), f"{_name(path)}: {structures[0]} against {structures[1]}")
    missing = [f"{_name(path + key)} is missing" for key in below_a if key not in below_b]
    added = [f"{_name(path + key)} is not in params[0]" for key in below_b if key not in below_a]
    return "; ".join(missing + added)


def _children(tree: Any) -> dict[KeyPath, Any]:
    """The children of a node by their keys."""
    return dict(tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0])


def _name(path: KeyPath) -> str:
    """`layers_0/kernel.codes`: keys of containers joined with `/`, fields with a dot."""
    parts = [("." if isinstance(key, GetAttrKey) else "/") + keystr((key,), simple=True) for key in path]
    return "".join(parts).lstrip("/") or "the root"
