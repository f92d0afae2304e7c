"""Every class that may sit at a weight leaf, by the name that model directories store."""

from jaxlm.core.weight import Weight
from jaxlm.core.weights.clustered import Clustered
from jaxlm.core.weights.factored import Factored
from jaxlm.core.weights.fake_quant import FakeQuant
from jaxlm.core.weights.input_scaled import InputScaled
from jaxlm.core.weights.learned import LSQ, PACT
from jaxlm.core.weights.low_rank import LowRank
from jaxlm.core.weights.masked import Masked, Scored
from jaxlm.core.weights.observed import Observed
from jaxlm.core.weights.quantized import Quantized
from jaxlm.core.weights.scheme import INT8, Scheme

WEIGHTS: dict[str, type[Weight]] = {
    cls.__name__: cls
    for cls in (Masked, Scored, FakeQuant, LSQ, PACT, Quantized, LowRank, InputScaled, Factored, Clustered)
}

__all__ = [
    "INT8",
    "LSQ",
    "PACT",
    "WEIGHTS",
    "Clustered",
    "Factored",
    "FakeQuant",
    "InputScaled",
    "LowRank",
    "Masked",
    "Observed",
    "Quantized",
    "Scheme",
    "Scored",
]
