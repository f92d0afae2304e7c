"""Losses as sums with weights: cross-entropy, and how far a student is from its teacher."""
