"""Structured pruning: whole heads, FFN units, stream dimensions and layers, closed by gates and then cut out.

Gates sit in the forward pass (`gates`) and are closed by scores (`scores`) or learned (`l0`); `shrink` slices every
array that carries a gated axis name (`slicing`, `width`, `depth`), so that the smaller model computes what the gated
one did.
"""
