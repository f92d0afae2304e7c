"""Post-training quantization: round to nearest (RTN)."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.core import (
    LM,
    NO_DATA,
    Quantized,
    SurgeryContext,
    check_rules,
    describe,
    first_match,
    map_leaves,
    materialize,
)
from jaxlm.methods.quantize.formats import TARGETS, change_matrices, channel_of, check_targets, formats, is_target


def quantize(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    bits: str = "int8",
    group: int | str | None = None,
    symmetric: bool = True,
    dynamic: bool | None = None,
    activations: Mapping[str, Any] | None = None,
    input_ranges: Sequence[tuple[str, tuple[float, float]]] = (),
    targets: str = TARGETS,
) -> LM:
    """Surgery: rounds every target to the nearest code of a number format. What is stored as codes already stays.

    Below scaled inputs (`smoothquant`) it is the base that is quantized, of a factored matrix (`svd`) both factors.

    Source: Jacob et al. 2017, arXiv:1712.05877; activations a token, Yao et al. 2022, ZeroQuant, arXiv:2206.01861;
    nf4, Dettmers et al. 2023, arXiv:2305.14314.

    When: first of all: int8 needs no data and costs next to nothing in quality. Below eight bits try `gptq` beside
    it.

    Args:
      bits: `int2` … `int8`, `fp8_e4m3`, `fp8_e5m2` or `nf4`.
      group: inputs that share a scale; `None` for one a channel, `"tensor"` for one a matrix.
      symmetric: `±max|w|`, or from the smallest to the largest weight with a zero point (integers only).
      dynamic: products quantize their activations too, a token at a time, and multiply integers; `None`: where bits is
        int8.
      activations: another format of the activations, `{"bits": "int8", "group": None, "symmetric": False}`; with the
        group `"tensor"` they are static and need `input_ranges`.
      input_ranges: rules `(regex over paths, (smallest, largest input))`, the first match counts.
      targets: regex over paths.

    Returns:
      the model with Quantized leaves.

    Raises:
      ValueError: for formats that do not exist or go together, rules that match nothing, a target without a range.
    """
    scheme, inputs = formats(
        "quantize", bits=bits, group=group, symmetric=symmetric, dynamic=dynamic, activations=activations
    )
    check_targets(lm.params, targets, "quantize")
    check_rules(input_ranges, describe(lm.params).values(), "quantize: input_ranges")
    static = inputs is not None and inputs.group == "tensor"
    if input_ranges and not static:
        raise ValueError("quantize: input_ranges are for static inputs; set activations={'group': 'tensor'}")

    def store(path: str, leaf: Any) -> Any:
        if not is_target(path, leaf, targets):
            return leaf
        input_range = first_match(input_ranges, path)
        if static and input_range is None:
            raise ValueError(f"quantize: no rule of input_ranges gives the inputs of {path} a range")
        channel = channel_of(path)

        def quantized(w: Any) -> Quantized:
            return Quantized.of(materialize(w), scheme, activations=inputs, channel=channel, input_range=input_range)

        return change_matrices(leaf, quantized)

    return lm.replace(params=map_leaves(store, lm.params))
