"""Adaptation with few parameters."""

from jaxlm.core import Entry

METHODS = {
    "lora": Entry("lora:lora", ("low_rank:LowRank",)),
}
