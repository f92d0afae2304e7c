"""Sharing: one set of values or of layers for several places."""
