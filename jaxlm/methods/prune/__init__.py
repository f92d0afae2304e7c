"""Pruning: single weights, whole structures, rows of the vocabulary."""

from jaxlm.core import Entry

METHODS = {
    "l0": Entry("structured.l0:l0", ("structured.hard_concrete:Constraint", "structured.hard_concrete:HardConcrete")),
    "magnitude": Entry("unstructured.magnitude:magnitude"),
    "movement": Entry("unstructured.movement:movement", ("unstructured.scored:Scored",)),
    "regrow": Entry("unstructured.regrow:regrow"),
    "structured": Entry("structured.gates:structured"),
    "taylor": Entry("unstructured.taylor:taylor"),
}
SURGERY = {
    "drop_layers": Entry("structured.depth:drop_layers"),
    "keep_layers": Entry("structured.depth:keep_layers"),
    "magnitude": Entry("unstructured.magnitude:prune_magnitude"),
    "prune": Entry("structured.gates:prune"),
    "sparsegpt": Entry("unstructured.sparsegpt:sparsegpt"),
    "trim_vocabulary": Entry("vocabulary:trim_vocabulary"),
    "wanda": Entry("unstructured.wanda:wanda"),
}
