"""Factorization: kernels as products of two narrow ones, by singular values, of the matrix or of what it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxlm.core import (
    LM,
    NO_DATA,
    Factored,
    InputScaled,
    SurgeryContext,
    Tree,
    check_rules,
    describe,
    flatten,
    map_leaves,
    matches,
)
from jaxlm.methods.calibration import KERNELS, Statistics, calibrate, matrix, per_leaf
from jaxlm.methods.second_order import cholesky


class Amount(NamedTuple):
    """How much of a matrix stays; exactly one of the three is set.

    Attributes:
      rank: this many singular values.
      energy: the fewest that hold this share of the sum of squares.
      size: as many as fit in this share of the matrix's parameters.
      larger: whether factors may be larger than the matrix.
    """

    rank: int | None = None
    energy: float | None = None
    size: float | None = None
    larger: bool = False

    def check(self, who: str) -> None:
        """Raises ValueError unless exactly one of the three is set, in its range."""
        names = [name for name in ("rank", "energy", "size") if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(f"{who}: give one of rank, energy and size, not {' and '.join(names) or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"{who}: rank {self.rank} must be at least 1")
        for name in ("energy", "size"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{who}: {name} must be in (0, 1], not {value}")


def worthwhile(inputs: int, outputs: int) -> int:
    """The largest rank with which two factors are smaller than the matrix: `r (m + n) < m n`.

    >>> worthwhile(768, 768), worthwhile(2, 2)
    (383, 0)
    """
    return (inputs * outputs - 1) // (inputs + outputs)


def rank_of(values: Float[np.ndarray, "values"], shape: tuple[int, int], amount: Amount) -> int:
    """The rank that an amount means for the singular values, in falling order, of a matrix of this shape.

    >>> rank_of(np.array([3.0, 2.0, 1.0]), (3, 3), Amount(energy=0.9))
    2
    >>> rank_of(np.ones(64), (64, 64), Amount(size=0.5))
    16
    """
    if amount.rank is not None:
        return min(amount.rank, len(values))
    if amount.size is not None:
        return min(max(int(amount.size * shape[0] * shape[1] / sum(shape)), 1), len(values))
    assert amount.energy is not None
    energy = np.cumsum(np.square(values))
    return int(np.searchsorted(energy, amount.energy * energy[-1] * (1 - 1e-12))) + 1


def factorize(
    W: Float[Array | np.ndarray, "in out"],
    S: Float[np.ndarray, "in in"] | None,
    choose_rank: Callable[[np.ndarray], int],
) -> tuple[Float64[np.ndarray, "in rank"], Float64[np.ndarray, "rank out"]]:
    """A and B with the smallest `‖X(W − AB)‖`, or without inputs the smallest `‖W − AB‖`.

    With `XᵀX = S Sᵀ` the error is `‖Sᵀ(W − AB)‖`, so the best `Sᵀ A B` is the truncated `SVD(SᵀW) = P Σ Qᵀ`:
    `A = S⁻ᵀ P √Σ`, `B = √Σ Qᵀ`. The squared error is the sum of the squares of the dropped singular values.

    >>> a, b = factorize(np.diag([2.0, 1.0]), np.diag([1.0, 4.0]), lambda values: 1)
    >>> np.abs(a @ b).round(6).tolist()
    [[0.0, 0.0], [0.0, 1.0]]

    Args:
      S: lower triangular, or `None` without inputs.
      choose_rank: from the singular values in falling order.
    """
    W = np.asarray(W, np.float64)
    P, values, QT = np.linalg.svd(W if S is None else S.T @ W, full_matrices=False)
    rank = choose_rank(values)
    root = np.sqrt(values[:rank])
    A, B = P[:, :rank] * root, root[:, None] * QT[:rank]
    if S is not None:
        from scipy.linalg import solve_triangular

        A = solve_triangular(S.T, A)
    return A, B


def factored(who: str, path: str, leaf: Any, amount: Amount, S: Float[np.ndarray, "in in"] | None = None) -> Any:
    """A leaf as two factors, or the leaf itself where the energy asked for takes factors as large as the matrix.

    Args:
      S: see `factorize`.

    Raises:
      ValueError: naming the parameter, where a rank asked for makes it larger.
    """
    most = worthwhile(*leaf.shape)
    A, B = factorize(matrix(who, path, leaf), S, lambda values: rank_of(values, leaf.shape, amount))
    rank = A.shape[1]
    if rank > most and not amount.larger:
        if amount.energy is not None:
            return leaf
        raise ValueError(
            f"{who}: with rank {rank} the factors of {path} {list(leaf.shape)} are no smaller than the matrix; the "
            f"largest rank that gains is {most} (larger=True factors it all the same)"
        )
    return Factored(jnp.asarray(A, leaf.dtype), jnp.asarray(B, leaf.dtype))


def check_gain(who: str, params: Tree, amount: Amount) -> None:
    """Raises ValueError where no matrix was worth factoring."""
    leaves = [leaf.base if isinstance(leaf, InputScaled) else leaf for leaf in flatten(params).values()]
    if amount.energy is not None and not any(isinstance(leaf, Factored) for leaf in leaves):
        raise ValueError(
            f"{who}: to hold {amount.energy} of the energy, every target needs factors as large as itself; ask for "
            f"less, or for a rank or a size"
        )


def svd(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: float | None = None,
    larger: bool = False,
    targets: str = KERNELS,
) -> LM:
    """Surgery: every target as a product of two narrow kernels, by its own singular values; no data needed.

    Source: Eckart and Young 1936, The approximation of one matrix by another of lower rank.

    When: matrices are wide and there is no calibration data; with data `activation_svd` loses less.

    Args:
      rank, energy, size: how much stays, one of them: see `Amount`. With `energy`, a matrix whose factors would be
        larger than itself stays as it is.
      larger: take such factors all the same, where a rank asks for them.
      targets: regex over paths; kernels anywhere, or a token table that is looked up.
    """
    amount = Amount(rank, energy, size, larger)
    amount.check("svd")
    check_rules([(targets, None)], describe(lm.params).values(), "svd: targets")
    params = map_leaves(
        lambda path, leaf: factored("svd", path, leaf, amount) if matches(targets, path) else leaf, lm.params
    )
    check_gain("svd", params, amount)
    return lm.replace(params=params)


def activation_svd(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: float | None = None,
    larger: bool = False,
    damping: float = 1e-4,
    targets: str = KERNELS,
) -> LM:
    """Surgery: as `svd`, but the outputs `XW` are approximated and not the matrix, on the calibration's inputs X.

    Source: Wang et al. 2024, SVD-LLM, arXiv:2403.07378.

    When: matrices are wide, their inputs few-dimensional, and there is calibration data; without data, `svd`.

    Args:
      rank, energy, size, larger: as for `svd`; the energy is that of the outputs.
      damping: what is added to `XᵀX`, as a share of the mean of its diagonal.
      targets: regex over paths.
    """
    who, amount = "activation_svd", Amount(rank, energy, size, larger)
    amount.check(who)

    def change(path: str, leaf: Any, statistics: Statistics) -> Any:
        assert statistics.hessian is not None
        return factored(who, path, leaf, amount, S=cholesky(statistics.hessian, damping, who, path))

    lm = calibrate(lm, context, per_leaf(change), who=who, targets=targets, hessian=True)
    check_gain(who, lm.params, amount)
    return lm
