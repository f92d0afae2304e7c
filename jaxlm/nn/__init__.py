"""Pure layers: dense, norms, positions, attention, the block, and stacks of blocks that scan."""
