"""Losses as sums with weights: cross-entropy, and everything that a student may learn from teachers."""
