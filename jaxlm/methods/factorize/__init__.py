"""Factorization: matrices as products of smaller ones."""

from jaxlm.core import Entry

SURGERY = {
    "activation_svd": Entry("svd:activation_svd"),
    "svd": Entry("svd:svd"),
}
