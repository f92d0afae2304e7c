"""Adaptation with few parameters."""
