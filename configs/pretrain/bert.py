"""Pre-training of a BERT by masked language modelling. The argument after the colon is its size.

    python experiments/train.py --config=configs/pretrain/bert.py:tiny --workdir=runs/bert

tiny: 1.9M parameters on the text of Python's standard library, no download; two CPU cores.
    After 1000 steps, three minutes: 5.25 nats a hidden token of the held-out modules, 15.4% of them right.
base: 110M parameters, the original's sizes. Any text: --config.data.format=jsonl --config.data.train='shards/*.jsonl'
    --config.data.eval=held_out.jsonl. Hardware: several accelerators. Not trained by us.

With --config.task=next_sentence a second head learns whether two passages follow each other, as in the original.
"""

from jaxlm.runner.config import default_config

SIZES = {
    "tiny": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_positions": 128},
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "max_positions": 512},
}


def get_config(size: str = "tiny"):
    if size not in SIZES:
        raise ValueError(f"configs/pretrain/bert.py:{size}: the sizes are {', '.join(SIZES)}")
    config = default_config()
    config.task = "masked"
    config.model.family = "bert"
    config.model.update(SIZES[size])

    config.data.format = "python"
    config.data.train = "stdlib[:60%]"
    config.data.eval = "stdlib[98%:]"
    config.data.max_length = config.model.max_positions

    config.train.schedule = "linear"
    config.train.weight_decay = 0.01
    config.train.clip = 1.0

    if size == "tiny":
        config.data.tokenizer = "wordpiece:8000"
        config.train.steps = 1000
        config.train.batch_size = 16
        config.train.learning_rate = 1e-3
        config.train.warmup = 0.1
        config.train.eval_every = 250
    else:
        config.data.tokenizer = "wordpiece:30522"
        config.model.dropout = 0.1
        config.model.attention_dropout = 0.1
        config.train.steps = 100_000
        config.train.batch_size = 256
        config.train.learning_rate = 1e-4
        config.train.warmup = 0.01
        config.train.dtype = "bfloat16"
        config.train.remat = "dots"
        config.train.eval_every = 5000
        config.train.checkpoint_every = 5000
    return config
