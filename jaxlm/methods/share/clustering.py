"""Weight clustering: k-means over the entries of a matrix, which then share k trained values."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, UInt8

from jaxlm.core import LM, NO_DATA, Masked, SurgeryContext, Weight, flatten, map_leaves, matches
from jaxlm.methods.calibration import KERNELS
from jaxlm.methods.share.clustered import Clustered

LARGEST_CODEBOOK = 256
ROUNDS = 100


def kmeans(
    values: Float[np.ndarray, "*shape"], k: int
) -> tuple[Float64[np.ndarray, "{k}"], UInt8[np.ndarray, "*shape"]]:
    """Codebook and codes with a small `Σ (x - codebook[code])²`, by Lloyd's rounds from evenly spread values.

    Nothing is random. As many distinct values as k, or fewer, are kept exactly. Between rounds a cluster without
    entries moves to the entry that is worst represented. Sorted values and prefix sums make a round cost `k log n`.

    >>> codebook, codes = kmeans(np.array([0.0, 10.0, 0.2, 9.8]), 2)
    >>> codebook.round(3).tolist(), codes.tolist()
    ([0.1, 9.9], [0, 1, 0, 1])

    Args:
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


def _lloyd(ordered: Float64[np.ndarray, "values"], centres: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "k"]:
    """Rounds of assignment and mean over sorted values until nothing moves."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(ROUNDS):
        ends = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
        ends = np.concatenate([[0], ends, [ordered.size]])
        counts = np.diff(ends)
        means = np.diff(sums[ends])[counts > 0] / counts[counts > 0]
        # A centre without entries moves to the entry that is farthest from its centre.
        for _ in range(centres.size - means.size):
            nearest = means[np.searchsorted((means[1:] + means[:-1]) / 2, ordered)]
            means = np.sort(np.append(means, ordered[np.argmax(np.abs(ordered - nearest))]))
        if np.array_equal(means, centres):
            break
        centres = means
    return centres


def clustered(
    w: Float[Array | np.ndarray, "in out"],
    k: int,
    group: int | None = None,
    kept: Bool[Array | np.ndarray, "in out"] | None = None,
) -> Clustered:
    """A matrix with k shared values, or k for every `group` inputs.

    Args:
      kept: entries that do not count, because a mask hides them, are left out of the means.
    """
    values = np.asarray(w, np.float32)
    kept = np.ones(values.shape, bool) if kept is None else np.asarray(kept)
    groups = np.arange(values.shape[0]) // (group or values.shape[0])
    codebook = np.zeros((groups[-1] + 1, k), np.float32)
    codes = np.zeros(values.shape, np.uint8)
    for number in range(len(codebook)):
        rows = groups == number
        codes_of_rows = np.zeros(values[rows].shape, np.uint8)
        codebook[number], codes_of_rows[kept[rows]] = kmeans(values[rows][kept[rows]], k)
        codes[rows] = codes_of_rows
    return Clustered(jnp.asarray(codes), jnp.asarray(groups, jnp.int32), jnp.asarray(codebook, w.dtype))


def cluster(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    values: int = 16,
    group: int | None = None,
    targets: str = KERNELS,
) -> LM:
    """Surgery: the entries of every target share `values` values, found by k-means; what is trained next is these.

    On disk an entry takes `log2(values)` bits, rounded up. Below a mask only the entries that it keeps are clustered.
    Source: Han et al. 2015, Deep Compression, arXiv:1510.00149.

    When: a file of few distinct values is wanted, and training afterwards may move these values alone.

    Args:
      values: size of a codebook, 2 to 256.
      group: inputs that share a codebook; `None` for all of a matrix.
      targets: regex over paths.

    Returns:
      the model with Clustered leaves.

    Raises:
      ValueError: for targets that match nothing, or hold a Weight whose entries cannot be set.
    """
    if not 2 <= values <= LARGEST_CODEBOOK:
        raise ValueError(f"cluster: values must be 2 to {LARGEST_CODEBOOK}, not {values}")
    if group is not None and group < 1:
        raise ValueError(f"cluster: group must be at least 1, not {group}")
    if not any(matches(targets, path) for path in flatten(lm.params)):
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
        shared = clustered(inner, values, group, kept)
        return leaf.replace(base=shared) if isinstance(leaf, Masked) else shared

    return lm.replace(params=map_leaves(change, lm.params))
