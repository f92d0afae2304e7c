"""Distillation: what a student learns from its teachers, and where their answers come from."""

from jaxlm.core import Entry

LOSSES = {
    "distill": Entry("method:distill"),
}
