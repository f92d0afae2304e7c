"""Quantization-aware training: straight through, with learned steps (LSQ), with learned clipping (PACT)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import (
    LM,
    Axes,
    FakeQuant,
    Gate,
    Method,
    MethodInit,
    Scheme,
    Tree,
    components,
    flatten,
    map_leaves,
    matches,
)
from jaxlm.methods.quantize.formats import TARGETS, channel_of, check_targets, formats, is_quantized
from jaxlm.methods.quantize.learned import LSQ, PACT


def qat(
    *,
    bits: str = "int8",
    group: int | str | None = None,
    symmetric: bool = True,
    dynamic: bool | None = None,
    activations: Mapping[str, Any] | None = None,
    targets: str = TARGETS,
) -> Method:
    """Quantization-aware training: the forward pass sees quantized weights, gradients pass straight through.

    Ranges follow the weights: `q(W)` with the grid of `quantize`, recomputed in every step. Baking stores the codes:
    the same function.

    Source: Jacob et al. 2017, arXiv:1712.05877; gradients straight through, Bengio et al. 2013, arXiv:1308.3432.

    When: round to nearest loses too much and there is training data: at four bits a channel it recovers most of the
    drop.

    Args:
      bits, group, symmetric: the format of the weights, see `quantize`.
      dynamic: quantize activations too, a token at a time; `None`: where bits is int8.
      activations: another format of the activations, by its fields.
      targets: regex over paths.
    """
    scheme, inputs = formats(
        "qat", bits=bits, group=group, symmetric=symmetric, dynamic=dynamic, activations=activations
    )
    if inputs is not None and inputs.group == "tensor":
        raise ValueError(
            "qat: activations are quantized a token at a time; the method pact learns one range for all of them"
        )
    wrap = lambda leaf, channel: FakeQuant.of(leaf, scheme, activations=inputs, channel=channel)  # noqa: E731
    return _quantization_aware("qat", wrap, scheme, targets)


def lsq(
    *,
    bits: str = "int4",
    group: int | str | None = None,
    dynamic: bool | None = None,
    activations: Mapping[str, Any] | None = None,
    targets: str = TARGETS,
) -> Method:
    """Learned step size quantization: `W = s · clip(round(W/s), ±Q)`, and `s` is trained with the weights.

    A step begins at `2 mean|W| / sqrt(Q)` and its gradient is scaled by `1/sqrt(N Q)`; see `learned_step`. Steps have
    the role `scale`: they never decay, and a learning rate of their own is a rule on it. Adam undoes the scaling of the
    gradient, so in 8 bits, where a step is small beside the weights, they want less:
    `config.train.learning_rates = ((".*#scale", 0.1),)`. Baking stores codes and steps: the same function. Source:
    Esser et al. 2020, arXiv:1902.08153.

    When: `qat` loses too much at four bits and fewer, so that the steps of the grid should be learned too; where
    both were measured, `qat` did as well.

    Args:
      bits, group: the format of the weights (symmetric integers), see `quantize`.
      dynamic: quantize activations too, a token at a time; `None`: where bits is int8.
      activations: another format of the activations, by its fields.
      targets: regex over paths.
    """
    scheme, inputs = formats("lsq", bits=bits, group=group, symmetric=True, dynamic=dynamic, activations=activations)
    if inputs is not None and inputs.group == "tensor":
        raise ValueError(
            "lsq: activations are quantized a token at a time; the method pact learns one range for all of them"
        )
    wrap = lambda leaf, channel: LSQ.of(leaf, scheme, activations=inputs, channel=channel)  # noqa: E731
    _check_format("lsq", wrap)
    return _quantization_aware("lsq", wrap, scheme, targets)


def pact(
    *,
    bits: str = "int8",
    group: int | str | None = None,
    symmetric: bool = True,
    input_bits: str = "int8",
    signed: bool = True,
    clip: float = 8.0,
    targets: str = TARGETS,
) -> Method:
    """PACT: every product clips its activations to `[-α, α]` and quantizes them on that one grid; `α` is trained.

    `∂/∂α` is 1 where an input lies above α (-1 below -α); see `learned_clip`. The bounds have the role `scale` and
    never decay; weights are quantized as in `qat`. Baking stores static activations, which need no look at the data
    when the model runs: the same function. Source: Choi et al. 2018, arXiv:1805.06085 (for inputs after a ReLU).

    When: the hardware wants one fixed range of inputs a product, and there is training that can learn it; without
    training, `quantize_static`.

    Args:
      bits, group, symmetric: the format of the weights (integers), see `quantize`.
      input_bits: of the activations.
      signed: clip to `[-α, α]`; `False` to `[0, α]`, for inputs that are never negative.
      clip: α at first: no smaller than most inputs.
      targets: regex over paths.
    """
    one_grid = {"bits": input_bits, "group": "tensor", "symmetric": signed}
    scheme, inputs = formats("pact", bits=bits, group=group, symmetric=symmetric, activations=one_grid)
    wrap = lambda leaf, channel: PACT.of(leaf, scheme, activations=inputs, channel=channel, clip=clip)  # noqa: E731
    _check_format("pact", wrap)
    method = _quantization_aware("pact", wrap, scheme, targets)

    def claims(params: Tree) -> set[tuple[str, str]]:
        # An update that is added later would read inputs that are not clipped, and could not be merged into W.
        not_updated = {path for path, leaf in flatten(params).items() if not _has_update(leaf)}
        return method.claims(params) | {(path, "update") for path in not_updated if matches(targets, path)}

    return method._replace(claims=claims)


def _has_update(leaf: Any) -> bool:
    """Whether a weight is a base beside factors that are added to it."""
    return {"base", "factor"} <= {part.role for part in components(leaf, (None, None)).values()}


def _check_format(name: str, wrap: Callable[[Any, int], FakeQuant]) -> None:
    """Raises ValueError for arguments that no leaf could be wrapped with."""
    try:
        wrap(jnp.ones((1, 1)), -1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _quantization_aware(name: str, wrap: Callable[[Any, int], FakeQuant], scheme: Scheme, targets: str) -> Method:
    """The Method that wraps its targets, and bakes to codes.

    Args:
      wrap: `(leaf, dimension of the channels) -> FakeQuant`.
    """

    def fake_quantized(path: str, leaf: Any) -> Any:
        if not matches(targets, path):
            return leaf
        if is_quantized(leaf):
            raise ValueError(f"{name}: {path} is rounded already ({type(leaf).__name__}); bake it, or leave it out")
        return wrap(leaf, channel_of(path))

    def init(key: jax.Array, lm: LM) -> MethodInit:
        check_targets(lm.params, targets, name)
        if isinstance(scheme.group, int):
            _refuse_gated_groups(name, lm.params, lm.axes, targets)
        return MethodInit(lm.replace(params=map_leaves(fake_quantized, lm.params)))

    def bake(lm: LM, state: dict[str, Any]) -> LM:
        stored = map_leaves(lambda path, leaf: leaf.quantize() if isinstance(leaf, FakeQuant) else leaf, lm.params)
        return lm.replace(params=stored)

    def claims(params: Tree) -> set[tuple[str, str]]:
        return {(path, "bits") for path in flatten(params) if matches(targets, path)}

    return Method(init=init, bake=bake, claims=claims)


def _refuse_gated_groups(name: str, params: Tree, axes: Mapping[str, Axes], targets: str) -> None:
    """Raises ValueError where a gate will remove single inputs of a target, whose groups would fall apart."""
    flat = flatten(params)
    for gate in [path for path, leaf in flat.items() if isinstance(leaf, Gate)]:
        module, gated = gate.rpartition("/")[0], set(_names(axes[gate]))
        for path in flat:
            input_axis = axes[path][-3 - channel_of(path)] if matches(targets, path) else None
            if path.startswith(module) and gated & set(_names((input_axis,))):
                raise ValueError(
                    f"{name}: {gate} will remove inputs of {path}, whose groups would fall apart: give it group=None, "
                    f"or prune in a stage before"
                )


def _names(axes: Axes) -> list[str]:
    """Names of all axes, those of compound ones apart."""
    return [n for entry in axes for n in (entry if isinstance(entry, tuple) else (entry,)) if n is not None]
