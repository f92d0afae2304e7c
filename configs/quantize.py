"""Quantization-aware training: a fine-tuned classifier learns with the roundings of int8 in its forward pass, and is
stored as int8, weights and tables by channel, inputs rounded a token at a time. The argument is the model.

    python experiments/train.py --config=configs/quantize.py:runs/sequence/model --workdir=runs/quantize \\
        --config.data.train=train.tsv --config.data.eval=dev.tsv --config.data.test=test.tsv

The model is a directory that configs/finetune/sequence.py left. Without any training (config.surgery, the entry
`quantize`) see the last stage of configs/quickstart.py. Hardware: two CPU cores are enough for 22M parameters.
Result on SST-2, one seed: test accuracy 88.5 (in floats 88.9), 23.6 MB instead of 90.9.
"""

from jaxlm.runner.config import default_config


def get_config(model: str = "runs/sequence/model"):
    config = default_config()
    config.task = "sequence"
    config.model.init = model

    config.data.format = "tsv"
    config.data.columns = ("text", "label")
    config.data.max_length = 128

    config.methods = ({"name": "qat", "dynamic": True},)

    config.train.epochs = 1
    config.train.batch_size = 32
    config.train.learning_rate = 2e-5
    config.train.schedule = "linear"
    config.train.warmup = 0.06
    config.train.weight_decay = 0.01
    config.train.clip = 1.0
    return config
