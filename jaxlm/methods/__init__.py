"""Methods that make a model smaller: masks, structured pruning, quantization."""
