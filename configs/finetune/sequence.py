"""Fine-tuning on labelled texts; here the columns of SST-2, a tsv without header (docs/data.md).

    python experiments/train.py --config=configs/finetune/sequence.py --workdir=runs/sequence \\
        --config.model.init=DIR --config.data.train=train.tsv --config.data.eval=dev.tsv --config.data.test=test.tsv

DIR is any model directory or hub id. Hardware: two CPU cores are enough for 22M parameters and 7,000 sentences.
Result on SST-2, all-MiniLM-L6-v2, two epochs (--config.train.epochs=2): test accuracy 88.7 ± 1.0, mean of three seeds;
torch + transformers 88.4 ± 1.0 (docs/results.md).
"""

from jaxlm.runner.config import default_config


def get_config():
    config = default_config()
    config.task = "sequence"

    config.data.format = "tsv"
    config.data.columns = ("text", "label")
    config.data.max_length = 128

    config.train.epochs = 3
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.schedule = "linear"
    config.train.warmup = 0.06
    config.train.weight_decay = 0.01
    config.train.clip = 1.0
    return config
