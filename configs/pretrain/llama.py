"""Pre-training of a Llama from scratch. The argument after the colon is its size.

    python experiments/train.py --config=configs/pretrain/llama.py:tiny --workdir=runs/llama

tiny: 2.4M parameters, grouped queries, on the text of Python's standard library, no download; two CPU cores. Not
    measured yet.
7b: 6.7B parameters, the sizes of Llama 2. Any text: text files by paragraph, or --config.data.format=jsonl
    --config.data.documents=file --config.data.train='shards/*.jsonl'.
    Hardware: 128 chips of a v5p (--config.mesh.data=4 --config.mesh.fsdp=32); not trained by us, but compiled for them.
7b-lora: the same body, frozen, with LoRA on every product of its layers; set --config.model.init to a model directory.
"""

from jaxlm.runner.config import default_config

TARGETS = r"layers_\d+/.*/kernel"
SIZES = {
    "tiny": {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 512},
    "7b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "ffn_size": 11008, "tie_embeddings": False},
}


def get_config(size: str = "tiny"):
    size, _, adapter = size.partition("-")
    if size not in SIZES or adapter not in ("", "lora"):
        raise ValueError(f"configs/pretrain/llama.py: no size {size!r}; there are {', '.join(SIZES)} and 7b-lora")
    config = default_config()
    config.task = "causal"
    config.model.family = "llama"
    config.model.update(SIZES[size])

    config.train.schedule = "cosine"
    config.train.final_learning_rate = 0.1
    config.train.warmup = 0.02
    config.train.weight_decay = 0.1
    config.train.b2 = 0.95

    if size == "tiny":
        config.data.format = "python"
        config.data.train = "stdlib[:60%]"
        config.data.eval = "stdlib[98%:]"
        config.data.tokenizer = "bpe:2048"
        config.data.max_length = 128
        config.train.steps = 500
        config.train.batch_size = 16
        config.train.learning_rate = 2e-3
    else:
        config.data.documents = "paragraph"
        config.data.tokenizer = "bpe:32000"
        config.data.max_length = 4096
        config.train.steps = 100_000
        config.train.batch_size = 128
        config.train.learning_rate = 3e-4
        config.train.dtype = "bfloat16"
        config.train.remat = "full"
        config.train.eval_every = 1000
        config.train.checkpoint_every = 1000
    if adapter:
        config.methods = ({"name": "lora", "rank": 16, "alpha": 32.0, "targets": TARGETS, "also_train": ""},)
        config.train.learning_rate = 1e-4
        config.train.weight_decay = 0.0
    return config
