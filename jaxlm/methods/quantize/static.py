"""Static quantization: inputs rounded to one grid that was measured before."""

from typing import Any

from jaxlm.core import Axes, Masked, Quantized, Tree
from jaxlm.methods.calibration import KERNELS, Calibration, Statistics, calibrate, each, matrix
from jaxlm.methods.quantize.formats import formats


def quantize_static(
    model: Any,
    params: Tree,
    axes: dict[str, Axes],
    calibration: Calibration,
    *,
    bits: str = "int8",
    group: int | str | None = None,
    symmetric: bool = True,
    input_bits: str = "int8",
    input_symmetric: bool = False,
    targets: str = KERNELS,
):
    """Surgery: rounds every target to the nearest code, and its inputs to one grid over all tokens.

    The grid reaches from the smallest to the largest input on the calibration text, behind the layers that are rounded
    already. No token has to look for its own largest entry, but one outlier sets the steps of all: with `quantize`, a
    grid a token, a model is nearly always closer to what it was. `smoothquant` in front helps most where it hurts most.

    Args:
      model, params, axes: the model, canonical view.
      calibration: text, from `config.calibration`.
      bits, group, symmetric: number format of the weights, see `Scheme`.
      input_bits, input_symmetric: that of the inputs.
      targets: regex over paths.
    """
    who = "quantize_static"
    fields = {"bits": input_bits, "group": "tensor", "symmetric": input_symmetric}
    scheme, inputs = formats(who, bits, group, symmetric, None, fields)

    def change(path: str, leaf: Any, statistics: Statistics) -> Any:
        dense = matrix(who, path, leaf).astype(leaf.dtype)
        found = float(statistics.low.min()), float(statistics.high.max())
        stored = Quantized.of(dense, scheme, activations=inputs, input_range=found)
        return leaf.replace(base=stored) if isinstance(leaf, Masked) else stored

    return model, calibrate(model, params, calibration, each(change), who=who, targets=targets), axes
