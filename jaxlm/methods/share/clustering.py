"""Weight clustering: k-means over the entries of a matrix, which then share k trained values."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.core import Axes, Clustered, Masked, Tree, Weight, flatten, map_leaves, matches
from jaxlm.methods.calibration import KERNELS

MOST = 256
ROUNDS = 100


def kmeans(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`(codebook [k], codes)` with a small `Σ (x - codebook[code])²`, by Lloyd's rounds from evenly spread values.

    Nothing is random. As many distinct values as k, or fewer, are kept exactly. Between rounds a cluster without
    entries moves to the entry that is worst represented. Sorted values and prefix sums make a round cost `k log n`.

    >>> codebook, codes = kmeans(np.array([0.0, 10.0, 0.2, 9.8]), 2)
    >>> codebook.round(3).tolist(), codes.tolist()
    ([0.1, 9.9], [0, 1, 0, 1])

    Args:
      values: floats of any shape.
      k: size of the codebook, at most 256.
    """
    flat = np.asarray(values, np.float64).reshape(-1)
    distinct = np.unique(flat)
    if distinct.size <= k:
        last = distinct[-1] if distinct.size else 0.0
        codebook = np.concatenate([distinct, np.full(k - distinct.size, last)])
    else:
        codebook = _lloyd(np.sort(flat), np.linspace(distinct[0], distinct[-1], k))
    codes = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, flat)
    if distinct.size <= k:
        codes = np.searchsorted(distinct, flat)
    return codebook, codes.astype(np.uint8).reshape(np.shape(values))


def _lloyd(ordered: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Rounds of assignment and mean over sorted values until nothing moves."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(ROUNDS):
        ends = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
        ends = np.concatenate([[0], ends, [ordered.size]])
        counts = np.diff(ends)
        new = np.diff(sums[ends])[counts > 0] / counts[counts > 0]
        for _ in range(centres.size - new.size):
            nearest = new[np.searchsorted((new[1:] + new[:-1]) / 2, ordered)]
            new = np.sort(np.append(new, ordered[np.argmax(np.abs(ordered - nearest))]))
        if np.array_equal(new, centres):
            break
        centres = new
    return centres


def clustered(w: Any, k: int, group: int | None = None, kept: Any = None) -> Clustered:
    """A matrix `[in, out]` with k shared values, or k for every `group` inputs.

    Args:
      w: numpy's or jax's.
      kept: bool `[in, out]`; entries that do not count, because a mask hides them, are left out of the means.
    """
    values = np.asarray(w, np.float32)
    kept = np.ones(values.shape, bool) if kept is None else np.asarray(kept)
    groups = np.arange(values.shape[0]) // (group or values.shape[0])
    codebook = np.zeros((groups[-1] + 1, k), np.float32)
    codes = np.zeros(values.shape, np.uint8)
    for number in range(len(codebook)):
        rows = groups == number
        own = np.zeros(values[rows].shape, np.uint8)
        codebook[number], own[kept[rows]] = kmeans(values[rows][kept[rows]], k)
        codes[rows] = own
    return Clustered(jnp.asarray(codes), jnp.asarray(groups, jnp.int32), jnp.asarray(codebook, w.dtype))


def cluster(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    *,
    values: int = 16,
    group: int | None = None,
    targets: str = KERNELS,
):
    """Surgery: the entries of every target share `values` values, found by k-means; what is trained next is these.

    On disk an entry takes `log2(values)` bits, rounded up. Below a mask only the entries that it keeps are clustered.
    Source: Han et al. 2015, Deep Compression, arXiv:1510.00149.

    Args:
      model, params, axes: the model, canonical view.
      values: size of a codebook, 2 to 256.
      group: inputs that share a codebook; `None` for all of a matrix.
      targets: regex over paths.

    Returns:
      `(model, params, axes)` with Clustered leaves.

    Raises:
      ValueError: for targets that match nothing, or hold a Weight whose entries cannot be set.
    """
    if not 2 <= values <= MOST:
        raise ValueError(f"cluster: values must be 2 to {MOST}, not {values}")
    if group is not None and group < 1:
        raise ValueError(f"cluster: group must be at least 1, not {group}")
    if not any(matches(targets, path) for path in flatten(params)):
        raise ValueError(f"cluster: targets {targets!r} match no parameter")

    def change(path: str, leaf: Any) -> Any:
        if not matches(targets, path):
            return leaf
        inner, kept = (leaf.base, leaf.mask) if isinstance(leaf, Masked) else (leaf, None)
        if isinstance(inner, Weight):
            raise ValueError(
                f"cluster: {path} holds a {type(inner).__name__}, whose entries cannot be set one by one; bake it "
                "first, or leave it out of targets"
            )
        new = clustered(inner, values, group, kept)
        return leaf.replace(base=new) if isinstance(leaf, Masked) else new

    return model, map_leaves(change, params), axes
