"""Moving scale from the inputs of products into their kernels, which changes no output: what SmoothQuant and AWQ share.

`x W = (x / s) (diag(s) W)`. Where a norm makes x and nothing else reads it, `1/s` is folded into the norm and costs
nothing; elsewhere (behind the residual sum in BERT, behind attention and activations, in front of a cross-attention's
keys) it is written down as an `InputScaled`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxlm.core import InputScaled, Masked
from jaxlm.methods.calibration import Group, matrix


def rescaled(who: str, group: Group, scale: Float32[Array, "in"], fold: bool = True) -> dict[str, Any]:
    """The leaves of a group, rescaled by `s`: every kernel of it, since they share their input.

    Args:
      who: the method, for messages.
      scale: `s`, positive.
      fold: whether `1/s` goes into the norm in front, where there is one that only these products read.
    """
    leaves: dict[str, Any] = {}
    for name, leaf in group.kernels.items():
        dense = (matrix(who, f"{group.layer}/{name}", leaf) * scale[:, None]).astype(leaf.dtype)
        leaves[name] = leaf.replace(base=dense) if isinstance(leaf, Masked) else dense
    if not (fold and group.norm):
        return {name: InputScaled(leaf, 1 / scale) for name, leaf in leaves.items()}
    for field in ("scale", "bias"):
        path = f"{group.norm}/{field}"
        if path in group.params:
            leaves[path] = (group.params[path].astype(jnp.float32) / scale).astype(group.params[path].dtype)
    return leaves
