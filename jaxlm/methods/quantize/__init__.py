"""Quantization: number formats, after training (PTQ) and in training (QAT)."""

from jaxlm.core import Entry

METHODS = {
    "lsq": Entry("qat:lsq", ("learned:LSQ",)),
    "pact": Entry("qat:pact", ("learned:PACT",)),
    "qat": Entry("qat:qat"),
}
SURGERY = {
    "awq": Entry("awq:awq"),
    "gptq": Entry("gptq:gptq"),
    "mixed_precision": Entry("mixed_precision:mixed_precision"),
    "mixed_precision_weights": Entry("mixed_precision:mixed_precision_weights"),
    "quantize": Entry("round_to_nearest:quantize"),
    "quantize_static": Entry("static:quantize_static"),
    "smoothquant": Entry("smoothquant:smoothquant"),
}
