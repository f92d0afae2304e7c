"""Quantization: number formats, after training (PTQ) and in training (QAT)."""
