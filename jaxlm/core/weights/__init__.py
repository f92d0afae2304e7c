"""Every class that may sit at a weight leaf, by the name that model directories store."""

from jaxlm.core.weight import Weight
from jaxlm.core.weights.clustered import Clustered
from jaxlm.core.weights.fake_quant import FakeQuant, fake_quantize
from jaxlm.core.weights.low_rank import LowRank
from jaxlm.core.weights.masked import Masked, Scored
from jaxlm.core.weights.quantized import Quantized, round_to_codes, scale_of

WEIGHTS: dict[str, type[Weight]] = {
    cls.__name__: cls for cls in (Masked, Scored, FakeQuant, Quantized, LowRank, Clustered)
}

__all__ = [
    "WEIGHTS",
    "Clustered",
    "FakeQuant",
    "LowRank",
    "Masked",
    "Quantized",
    "Scored",
    "fake_quantize",
    "round_to_codes",
    "scale_of",
]
