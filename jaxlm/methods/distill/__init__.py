"""Distillation: what a student learns from its teachers, and where their answers come from."""
