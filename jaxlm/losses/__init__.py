"""Losses as sums with weights: cross-entropy, and distillation from a teacher."""
