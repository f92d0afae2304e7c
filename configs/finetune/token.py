"""Fine-tuning on labelled words; here sentences in CoNLL columns, WNUT-17 for example (docs/data.md).

    python experiments/train.py --config=configs/finetune/token.py --workdir=runs/token \\
        --config.model.init=DIR --config.data.train=wnut17train.conll --config.data.eval=emerging.dev.conll \\
        --config.data.test=emerging.test.annotated

DIR is any model directory or hub id. Hardware: two CPU cores are enough for 22M parameters and 3,400 sentences.
Result on WNUT-17, all-MiniLM-L6-v2: entity F1 42.2 ± 0.5 on test, mean of three seeds; torch + transformers with equal
settings 40.2 ± 1.9 (docs/results.md).
"""

from jaxlm.runner.config import default_config


def get_config():
    config = default_config()
    config.task = "token"

    config.data.format = "conll"
    config.data.max_length = 128

    config.train.epochs = 3
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.schedule = "linear"
    config.train.warmup = 0.06
    config.train.weight_decay = 0.01
    config.train.clip = 1.0
    return config
