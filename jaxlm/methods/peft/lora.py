"""LoRA: trains a low-rank update beside frozen weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import LM, ArrayInfo, Method, MethodInit, Tree, flatten, map_leaves, matches
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.peft.merging import check_mergeable, merging


def lora(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    targets: str = r".*attention/(query|value)/kernel",
    also_train: str = r"head/.*",
) -> Method:
    """`y = x W + (α/r) · drop(x) A B` with W frozen, A uniform (Kaiming, √5) and B zero at first.

    Baking merges: `W + (α/r) A B`, in float32, dense (a quantized W comes back dense; quantize it again in a later
    stage). A W that quantizes its activations is refused: what is merged would not. Source: Hu et al. 2021,
    arXiv:2106.09685; `α/√r` with `rank_stabilized`, Kalajdzievski 2023, arXiv:2312.03732.

    When: training all parameters takes too much memory, or many adapted models share one base, which may be
    quantized (nf4 is the usual one).

    Args:
      rank: columns of A; alpha: strength; dropout: rate on the update's input.
      rank_stabilized: divide α by √r, so that the update does not vanish as the rank grows.
      targets: regex over paths of the kernels that get an update.
      also_train: regex over paths that train in full besides (a fresh classifier).
    """
    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, not {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: dropout {dropout} must be in [0, 1)")
    scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)

    def init(key: jax.Array, lm: LM) -> MethodInit:
        paths = [path for path in flatten(lm.params) if matches(targets, path)]
        if not paths:
            raise ValueError(f"lora: targets {targets!r} match no parameter")
        keys = dict(zip(paths, jax.random.split(key, len(paths)), strict=True))

        def adapt(path: str, leaf: Any) -> Any:
            if path not in keys:
                return leaf
            check_mergeable("lora", path, leaf)
            rows, columns = leaf.shape
            bound = 1 / math.sqrt(rows)  # Kaiming uniform with a = sqrt(5): gain sqrt(1/3), bound gain * sqrt(3/rows)
            a = jax.random.uniform(keys[path], (rows, rank), jnp.float32, -bound, bound)
            return LowRank(leaf, a, jnp.zeros((rank, columns), jnp.float32), scale=scale, rate=dropout)

        return MethodInit(lm.replace(params=map_leaves(adapt, lm.params)))

    def trainable(info: ArrayInfo) -> bool:
        is_update = info.role == "factor" and ".base." not in info.name  # a factored base has factors too
        return is_update or matches(also_train, info.path)

    def claims(params: Tree) -> set[tuple[str, str]]:
        return {(path, "update") for path in flatten(params) if matches(targets, path)}

    return Method(init=init, trainable=trainable, bake=merging(LowRank), claims=claims)
