"""A search: how much of the FFN of a fine-tuned classifier can be cut out. Shares from 0 to 0.9, each recovered by
distillation, and the front of accuracy against speed with its knee. The argument is the model.

    python experiments/search.py --config=configs/search.py:runs/sequence/model --workdir=runs/search \\
        --config.data.train=train.tsv --config.data.eval=dev.tsv --config.data.test=test.tsv

The model is a directory that configs/finetune/sequence.py left. Hardware: two CPU cores are enough for 22M parameters
and 7,000 sentences.
Not measured yet.
"""

from jaxlm.runner.config import default_config


def get_config(model: str = "runs/sequence/model"):
    config = default_config()
    config.task = "sequence"
    config.model.init = model

    config.data.format = "tsv"
    config.data.columns = ("text", "label")
    config.data.max_length = 128

    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.schedule = "linear"
    config.train.warmup = 0.06
    config.train.weight_decay = 0.01
    config.train.clip = 1.0

    config.stages = (
        {"name": "whole", "description": "the model as it came"},
        {
            "name": "pruned",
            "description": "FFN units cut out, recovered by distillation",
            "after": "whole",
            "reference": "whole",
            "surgery": ({"name": "prune", "ffn": 0.5},),
            "losses": ({"name": "distill", "teacher": "whole", "alpha": 0.7, "temperature": 2.0, "hidden": 1.0},),
            "train": {"epochs": 1.0},
        },
    )
    config.search.vary = ({"stage": "pruned", "field": "surgery.0.ffn", "low": 0.0, "high": 0.9},)
    config.search.cost = "speed"
    config.search.trials = 10

    config.report.title = "How much of the FFN can go"
    config.report.corpus = "labelled sentences"
    config.report.split = "test"
    return config
