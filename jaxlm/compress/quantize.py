"""int8: training with rounding in the loop, and rounding after training."""

from typing import Any

import jax

from jaxlm.core import Adapted, FakeQuant, Method, Quantized, Tree, flatten, map_leaves, matches, materialize

KERNELS = r".*/kernel"
TABLES = r"embed/tokens/embedding"


def _channel(path: str) -> int:
    """Rows of an embedding table own the scales (they are the outputs of a tied head), columns of a kernel."""
    return -2 if path.endswith("/embedding") else -1


def _check(params: Tree, targets: str, who: str) -> None:
    if not any(matches(targets, path) for path in flatten(params)):
        raise ValueError(f"{who}: targets {targets!r} match no parameter")


def _fake(path: str, leaf: Any, dynamic: bool) -> FakeQuant:
    if isinstance(leaf, FakeQuant | Quantized):
        raise ValueError(f"qat: {path} is rounded already ({type(leaf).__name__}); bake it first, or leave it out")
    return FakeQuant(leaf, dynamic=dynamic, channel=_channel(path))


def qat(*, dynamic: bool = True, targets: str = f"{KERNELS}|{TABLES}") -> Method:
    """Quantization-aware training: the forward pass sees int8 roundings, gradients pass straight through.

    Baking stores the codes: the same function, since scales are those that training used.

    Args:
      dynamic: round inputs too, a token at a time.
      targets: regex over paths.
    """

    def init(key: jax.Array, model: Any, params: Tree, axes: dict) -> Adapted:
        _check(params, targets, "qat")
        wrap = lambda path, leaf: _fake(path, leaf, dynamic) if matches(targets, path) else leaf  # noqa: E731
        return Adapted(map_leaves(wrap, params), axes)

    def bake(model: Any, params: Tree, axes: dict, state: dict):
        stored = map_leaves(lambda path, leaf: leaf.quantize() if isinstance(leaf, FakeQuant) else leaf, params)
        return model, stored, axes

    def claims(params: Tree) -> set[tuple[str, str]]:
        return {(path, "bits") for path in flatten(params) if matches(targets, path)}

    return Method(init=init, bake=bake, claims=claims)


def quantize(model: Any, params: Tree, axes: dict, *, dynamic: bool = True, targets: str = f"{KERNELS}|{TABLES}"):
    """Surgery: rounds every target to the nearest int8 code, one scale a channel.

    Args:
      model, params, axes: the model, canonical view.
      dynamic: products round their inputs too and multiply integers.
      targets: regex over paths.

    Returns:
      `(model, params, axes)` with Quantized leaves.
    """
    _check(params, targets, "quantize")

    def store(path: str, leaf: Any) -> Any:
        if not matches(targets, path) or isinstance(leaf, Quantized):
            return leaf
        return Quantized.of(materialize(leaf), dynamic=dynamic, channel=_channel(path))

    return model, map_leaves(store, params), axes
