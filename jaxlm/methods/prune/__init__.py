"""Pruning: single weights, whole structures, rows of the vocabulary."""
