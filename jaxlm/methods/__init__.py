"""Methods, a folder a kind: peers never import each other, each may import core, losses and data."""

from jaxlm.core import Entry

SURGERY = {
    "bake": Entry("bake:bake"),
}
