"""Losses as sums with weights: cross-entropy, and the distances between a student and its teacher."""
