"""Quantization: number formats, rounding after training and in training."""
