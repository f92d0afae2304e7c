"""Results on SST-2: a fine-tuned encoder made smaller in every way, each with its control.

    python experiments/pipeline.py --config=configs/reproduce/sst2.py --workdir=runs/reproduce/sst2 \\
        --config.model.init=ENCODER --config.data.train=DATA/sst2/train.tsv \\
        --config.data.eval=DATA/sst2/dev.tsv --config.data.test=DATA/sst2/test.tsv

`make reproduce` runs this and its neighbours. ENCODER is the directory of all-MiniLM-L6-v2, 6 layers and 22.7 million
parameters. Hardware: two CPU cores.
Measured with its neighbours (docs/results.md).
"""

from jaxlm.report.acceptance import Criterion, Results, at_least, at_most, positive
from jaxlm.runner.config import default_config

LEARN = {"name": "distill", "teacher": "teacher", "alpha": 0.7, "temperature": 2.0, "hidden": 1.0}
HALF = ({"name": "prune", "heads": 0.5, "ffn": 0.5, "score": "taylor"},)
# With the classifier's own layers three of six are 50.7% of the parameters: a few units make it a half.
THREE = ({"name": "keep_layers", "keep": (0, 2, 5)}, {"name": "prune", "ffn": 1 / 32})


def get_config():
    config = default_config()
    config.task = "sequence"
    config.model.init = "ENCODER"

    config.data.format = "tsv"
    config.data.train = "DATA/sst2/train.tsv"
    config.data.eval = "DATA/sst2/dev.tsv"
    config.data.test = "DATA/sst2/test.tsv"
    config.data.columns = ("text", "label")
    config.data.max_length = 128

    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.schedule = "linear"
    config.train.warmup = 0.06
    config.train.weight_decay = 0.01
    config.train.clip = 1.0

    after = {"after": "teacher", "reference": "teacher"}
    config.stages = (
        {"name": "teacher", "description": "the encoder, fine-tuned", "train": {"epochs": 3.0}},
        {
            **after,
            "name": "int8-weights",
            "description": "int8 weights and tables, products in floats",
            "surgery": ({"name": "quantize", "dynamic": False},),
        },
        {
            **after,
            "name": "int8",
            "description": "int8 weights, tables and inputs",
            "surgery": ({"name": "quantize", "dynamic": True},),
        },
        {
            **after,
            "name": "half",
            "description": "half of heads and FFN units cut out, recovered by distillation",
            "beside": ("half-alone",),
            "surgery": HALF,
            "losses": (LEARN,),
            "train": {"epochs": 3.0},
        },
        {
            **after,
            "name": "half-alone",
            "description": "the same cut, the same steps, without the teacher",
            "surgery": HALF,
            "train": {"epochs": 3.0},
        },
        {
            **after,
            "name": "student",
            "description": "three of six layers, distilled",
            "beside": ("student-alone",),
            "surgery": THREE,
            "losses": (LEARN,),
            "train": {"epochs": 3.0},
        },
        {
            "name": "student-trimmed",
            "description": "the student without the tokens that the training data never use",
            "after": "student",
            "reference": "teacher",
            "beside": ("student",),
            "surgery": ({"name": "trim_vocabulary"},),
        },
        {
            **after,
            "name": "student-alone",
            "description": "the same three layers, the same steps, without the teacher",
            "surgery": THREE,
            "train": {"epochs": 3.0},
        },
        {
            "name": "chain-pruned",
            "description": "the student without half of the FFN and a third of the heads, distilled again",
            "after": "student",
            "reference": "teacher",
            "surgery": ({"name": "prune", "heads": 1 / 3, "ffn": 0.5, "score": "taylor"},),
            "losses": (LEARN,),
            "train": {"epochs": 4.0},
        },
        {
            "name": "chain",
            "description": "the same in int8",
            "after": "chain-pruned",
            "reference": "teacher",
            "beside": ("chain-pruned",),
            "surgery": ({"name": "quantize", "dynamic": True},),
        },
    )
    config.report.title = "SST-2"
    config.report.corpus = "SST-2, test"
    config.report.split = "test"
    config.report.tolerance = 0.03
    return config


def criteria(results: Results) -> list[Criterion]:
    return [
        at_least("int8 weights: predictions as in floats", results.agreement("int8-weights"), 0.99, "%"),
        at_least("int8 weights and inputs: predictions as in floats", results.agreement("int8"), 0.99, "%"),
        at_most("int8: file, of the float32 file", results.bytes("int8", "teacher"), 0.30, "%"),
        at_least("half of heads and FFN: times as fast", results.speed("half", "teacher"), 1.6, "×"),
        results.recovers(
            "half of heads and FFN: share of the drop that distillation recovers",
            "half",
            "half-alone",
            "teacher",
            0.5,
        ),
        at_least("half of the layers: times as fast", results.speed("student", "teacher"), 1.8, "×"),
        positive("three layers: distilled minus undistilled", results.gain("student", "student-alone"), "points"),
        at_least("three layers: share of the teacher's score", results.share("student", "teacher"), 0.96, "%"),
        at_most("three layers: non-embedding parameters", results.parameters("student", "teacher"), 0.5, "%"),
        at_most(
            "three layers, vocabulary trimmed: parameters",
            results.parameters("student-trimmed", "teacher", embeddings=True),
            0.60,
            "%",
        ),
        at_least(
            "three layers, vocabulary trimmed: share of the score",
            results.share("student-trimmed", "teacher"),
            0.96,
            "%",
        ),
        at_least("chain: smaller", 1 / results.bytes("chain", "teacher"), 3.0, "×"),
        at_least("chain: times as fast", results.speed("chain", "teacher"), 2.5, "×"),
        at_least("chain: share of the teacher's score", results.share("chain", "teacher"), 0.97, "%"),
    ]
