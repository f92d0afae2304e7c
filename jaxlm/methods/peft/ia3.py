"""IA3: trains one factor an output of some products, beside frozen weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxlm.core import (
    LM,
    ArrayInfo,
    Axes,
    Component,
    Context,
    Method,
    MethodInit,
    Tree,
    Weight,
    Wrapper,
    check_rules,
    describe,
    dot,
    flatten,
    map_leaves,
    matches,
    materialize,
)
from jaxlm.methods.peft.merging import check_mergeable, merging


class IA3(Wrapper):
    """`W = base diag(scale)`, run as `x W = (x base) ⊙ scale`."""

    scale: Float[Array, "*layers out"]

    @classmethod
    def of(cls, base: Float[Array, "in out"] | Weight) -> "IA3":
        """The base itself: scales of 1."""
        return cls(base, jnp.ones(base.shape[-1], jnp.float32))

    def materialize(self) -> Float[Array, "*layers in out"]:
        return (materialize(self.base).astype(jnp.float32) * self.scale[..., None, :]).astype(self.dtype)

    def dot(
        self, x: Float[Array, "*batch in"], ctx: Context, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        y = dot(x, self.base, ctx, dtype)
        return (y.astype(jnp.float32) * self.scale).astype(y.dtype)  # in bfloat16 a factor near 1 has three digits

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"base": Component(axes, "base"), "scale": Component(axes[1:], "scale")}


def ia3(*, targets: str = r".*attention/(key|value)/kernel|.*mlp/up/kernel", also_train: str = r"head/.*") -> Method:
    """`y = (x W) ⊙ l` with W frozen and one trained vector l a product, 1 at first.

    Baking multiplies: `W diag(l)`, in float32, dense. Biases are not scaled. In a gated FFN `up` is where the paper has
    its third vector; without a gate the paper scales behind the activation, and this in front of it. Source: Liu et
    al. 2022, arXiv:2205.05638.

    When: many tasks share one frozen model and each may add a few kilobytes only; where it may add more, `lora`.

    Args:
      targets: regex over paths of the kernels whose outputs are scaled.
      also_train: regex over paths that train in full besides (a fresh classifier).
    """

    def init(key: jax.Array, lm: LM) -> MethodInit:
        check_rules([(targets, None)], describe(lm.params).values(), "ia3: targets")

        def adapt(path: str, leaf: Any) -> Any:
            if not matches(targets, path):
                return leaf
            check_mergeable("ia3", path, leaf)
            return IA3.of(leaf)

        return MethodInit(lm.replace(params=map_leaves(adapt, lm.params)))

    def trainable(info: ArrayInfo) -> bool:
        return (info.role == "scale" and matches(targets, info.path)) or matches(also_train, info.path)

    def claims(params: Tree) -> set[tuple[str, str]]:
        return {(path, "update") for path in flatten(params) if matches(targets, path)}

    return Method(init=init, trainable=trainable, bake=merging(IA3), claims=claims)
