"""Weights that methods of several kinds know: what a matrix is stored as, and what is wrapped around it."""

from jaxlm.core.weights.factored import Factored
from jaxlm.core.weights.fake_quant import FakeQuant
from jaxlm.core.weights.input_scaled import InputScaled
from jaxlm.core.weights.masked import Masked
from jaxlm.core.weights.quantized import Quantized
from jaxlm.core.weights.scheme import INT8, Scheme

__all__ = ["INT8", "Factored", "FakeQuant", "InputScaled", "Masked", "Quantized", "Scheme"]
