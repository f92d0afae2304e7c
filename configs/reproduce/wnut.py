"""Results on WNUT-17: a fine-tuned encoder that finds entities, its smaller students, and the whole chain.

    python experiments/pipeline.py --config=configs/reproduce/wnut.py --workdir=runs/reproduce/wnut \\
        --config.model.init=ENCODER --config.data.train=DATA/wnut17/wnut17train.conll \\
        --config.data.eval=DATA/wnut17/emerging.dev.conll --config.data.test=DATA/wnut17/emerging.test.annotated

`make reproduce` runs this and its neighbours. ENCODER is the directory of all-MiniLM-L6-v2, 6 layers and 22.7 million
parameters; the stage student-more names sentences of STS-B under DATA too. Hardware: two CPU cores.
Measured with its neighbours (docs/results.md).
"""

from jaxlm.report.acceptance import Criterion, Results, at_least, at_most, positive
from jaxlm.runner.config import default_config

LEARN = {"name": "distill", "teacher": "teacher", "alpha": 0.7, "temperature": 2.0, "hidden": 1.0}
# Chosen on the development set: 0, 1, 2 reach 53.4 there and 0, 1, 3 reach 52.2, 0, 2, 5 49.9; what finds names sits
# low.
THREE = ({"name": "keep_layers", "keep": (0, 1, 2)},)
# The chain goes on from here, chosen on the development set: 56.1, and 52.9 with three layers.
HALF = ({"name": "prune", "heads": 0.5, "ffn": 0.5, "score": "taylor"},)
STEPS = {"steps": 1070}
"""Ten epochs over the training data alone."""
STS = ("genre", "file", "year", "number", "score", "text", "other", "...")


def get_config():
    config = default_config()
    config.task = "token"
    config.model.init = "ENCODER"

    config.data.format = "conll"
    config.data.train = "DATA/wnut17/wnut17train.conll"
    config.data.eval = "DATA/wnut17/emerging.dev.conll"
    config.data.test = "DATA/wnut17/emerging.test.annotated"
    config.data.max_length = 128

    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.schedule = "linear"
    config.train.warmup = 0.06
    config.train.weight_decay = 0.01
    config.train.clip = 1.0

    after = {"after": "teacher", "reference": "teacher"}
    config.stages = (
        {"name": "teacher", "description": "the encoder, fine-tuned", "train": {"epochs": 4.0}},
        {
            **after,
            "name": "student",
            "description": "three of six layers, distilled",
            "beside": ("student-alone",),
            "surgery": THREE,
            "losses": (LEARN,),
            "train": STEPS,
        },
        {
            **after,
            "name": "student-alone",
            "description": "the same three layers, the same steps, without the teacher",
            "surgery": THREE,
            "train": STEPS,
        },
        {
            **after,
            "name": "student-more",
            "description": "the student again, distilled on unlabelled sentences too",
            "beside": ("student",),
            "data": {
                "unlabelled": "DATA/stsb/sts-train.tsv",
                "unlabelled_format": "tsv",
                "unlabelled_columns": STS,
            },
            "surgery": THREE,
            "losses": (LEARN,),
            "train": STEPS,
        },
        {
            **after,
            "name": "half",
            "description": "half of heads and FFN units cut out, recovered by distillation",
            "beside": ("half-alone",),
            "surgery": HALF,
            "losses": (LEARN,),
            "train": STEPS,
        },
        {
            **after,
            "name": "half-alone",
            "description": "the same cut, the same steps, without the teacher",
            "surgery": HALF,
            "train": STEPS,
        },
        {
            "name": "student-int8",
            "description": "the student in int8",
            "after": "student",
            "reference": "teacher",
            "beside": ("student",),
            "surgery": ({"name": "quantize", "dynamic": True},),
        },
        {
            "name": "chain",
            "description": "half of heads and FFN units in int8: pruned, distilled, rounded",
            "after": "half",
            "reference": "teacher",
            "beside": ("half",),
            "surgery": ({"name": "quantize", "dynamic": True},),
        },
    )
    config.report.title = "WNUT-17"
    config.report.corpus = "WNUT-17, the annotated emerging test set"
    config.report.split = "test"
    config.report.tolerance = 0.03
    return config


def criteria(results: Results) -> list[Criterion]:
    return [
        results.recovers(
            "half of heads and FFN: share of the drop that distillation recovers",
            "half",
            "half-alone",
            "teacher",
            0.5,
        ),
        positive("three layers: distilled minus undistilled", results.gain("student", "student-alone"), "points"),
        at_least("three layers: share of the teacher's score", results.share("student", "teacher"), 0.96, "%"),
        at_most("three layers: non-embedding parameters", results.parameters("student", "teacher"), 0.505, "%"),
        at_least("chain: smaller", 1 / results.bytes("chain", "teacher"), 3.0, "×"),
        at_least("chain: times as fast", results.speed("chain", "teacher"), 2.5, "×"),
        at_least("chain: share of the teacher's score", results.share("chain", "teacher"), 0.97, "%"),
    ]
