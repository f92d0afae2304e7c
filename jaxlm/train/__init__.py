"""Training: settings, optimizers, the step, the loop, and what it writes. Knows no model, task or method."""
