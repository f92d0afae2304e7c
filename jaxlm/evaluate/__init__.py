"""What a model costs and what it is worth: counting, timing, evaluating, comparing."""
