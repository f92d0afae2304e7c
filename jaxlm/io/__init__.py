"""Model directories, safetensors and transformers' names, and training checkpoints."""
