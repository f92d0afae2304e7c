"""Unstructured pruning: single weights become zero, while training goes on or at once."""
