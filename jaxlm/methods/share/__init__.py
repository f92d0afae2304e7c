"""Sharing: one set of values or of layers for several places."""

from jaxlm.core import Entry

SURGERY = {
    "cluster": Entry("clustering:cluster", ("clustered:Clustered",)),
    "share": Entry("layers:share"),
    "unshare": Entry("layers:unshare"),
}
