"""Pre-training of a GPT-2 from scratch. The argument after the colon is its size.

    python experiments/train.py --config=configs/pretrain/gpt.py:characters --workdir=runs/characters \\
        --config.data.train='input.txt[:90%]' --config.data.eval='input.txt[90%:]'

characters: 0.8M parameters, one token a character; tinyshakespeare (docs/data.md); two CPU cores are enough.
    Validation loss 1.895 nats a character; torch + transformers after as many steps: 1.908 (docs/results.md).
small: 110M parameters, the original's sizes with a vocabulary of 32,000. Any text: text files by paragraph, or
    --config.data.format=jsonl --config.data.documents=file --config.data.train='shards/*.jsonl'.
    Hardware: one large accelerator, or any mesh (--config.mesh.fsdp=8). Not trained by us.
1b: 1.3B parameters (24 layers, width 2048). Hardware: 16 chips of a v5e or more (--config.mesh.data=1
    --config.mesh.fsdp=8 --config.mesh.tensor=2); not trained by us, but compiled for them (docs/results.md).
"""

from jaxlm.runner.config import default_config

SIZES = {
    "characters": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_positions": 64},
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "max_positions": 1024},
    "1b": {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "max_positions": 2048},
}


def get_config(size: str = "small"):
    if size not in SIZES:
        raise ValueError(f"configs/pretrain/gpt.py:{size}: the sizes are {', '.join(SIZES)}")
    config = default_config()
    config.task = "causal"
    config.model.family = "gpt2"
    config.model.update(SIZES[size])

    config.data.format = "text"
    config.data.max_length = config.model.max_positions

    config.train.schedule = "cosine"
    config.train.final_learning_rate = 0.1
    config.train.weight_decay = 0.1
    config.train.clip = 1.0

    if size == "characters":
        config.data.tokenizer = "character"
        config.train.steps = 2000
        config.train.batch_size = 12
        config.train.learning_rate = 1e-3
        config.train.warmup = 100
        config.train.b2 = 0.99
        config.train.eval_every = 250
    else:
        config.data.documents = "paragraph"
        config.data.tokenizer = "bpe:32000"
        config.train.steps = 20_000
        config.train.batch_size = 512
        config.train.grad_accum = 8
        config.train.learning_rate = 6e-4 if size == "small" else 2e-4
        config.train.warmup = 0.03
        config.train.b2 = 0.95
        config.train.dtype = "bfloat16"
        config.train.remat = "dots" if size == "small" else "full"
        config.train.eval_every = 1000
        config.train.checkpoint_every = 1000
    return config
