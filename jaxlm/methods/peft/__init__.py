"""Adaptation with few parameters."""

from jaxlm.core import Entry

METHODS = {
    "ia3": Entry("ia3:ia3", ("ia3:IA3",)),
    "lora": Entry("lora:lora", ("low_rank:LowRank",)),
}
