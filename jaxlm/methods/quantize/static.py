"""Static quantization: activations quantized on one grid that was measured before."""

from typing import Any

from jaxlm.core import LM, NO_DATA, Masked, Quantized, SurgeryContext
from jaxlm.methods.calibration import KERNELS, Statistics, calibrate, matrix, per_leaf
from jaxlm.methods.quantize.formats import formats


def quantize_static(
    lm: LM,
    context: SurgeryContext = NO_DATA,
    *,
    bits: str = "int8",
    group: int | str | None = None,
    symmetric: bool = True,
    input_bits: str = "int8",
    input_symmetric: bool = False,
    targets: str = KERNELS,
) -> LM:
    """Surgery: rounds every target to nearest, and its activations to one grid over all tokens.

    The grid reaches from the smallest to the largest input on the calibration text, behind the layers that are
    quantized already. No token has to look for its own largest entry, but one outlier sets the steps of all: with
    `quantize`, a grid a token, a model is nearly always closer to what it was. `smoothquant` in front helps most where
    it hurts most.

    Source: Jacob et al. 2017, arXiv:1712.05877.

    When: the hardware wants one range of inputs for all tokens, and there is calibration data.

    Args:
      bits, group, symmetric: number format of the weights, see `Scheme`.
      input_bits, input_symmetric: that of the activations.
      targets: regex over paths.
    """
    who = "quantize_static"
    one_grid = {"bits": input_bits, "group": "tensor", "symmetric": input_symmetric}
    scheme, activations = formats(who, bits=bits, group=group, symmetric=symmetric, activations=one_grid)

    def change(path: str, leaf: Any, statistics: Statistics) -> Any:
        dense = matrix(who, path, leaf).astype(leaf.dtype)
        input_range = float(statistics.low.min()), float(statistics.high.max())
        stored = Quantized.of(dense, scheme, activations=activations, input_range=input_range)
        return leaf.replace(base=stored) if isinstance(leaf, Masked) else stored

    return calibrate(lm, context, per_leaf(change), who=who, targets=targets)
