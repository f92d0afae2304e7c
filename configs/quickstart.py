"""Quickstart: a small GPT is trained, distilled, pruned and quantized, and every step is measured. No download.

    python experiments/pipeline.py --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: two CPU cores, 4 minutes. The text is the Python installation's own library, split by module.
Result, against the teacher's 1.975 bits per byte, 8.01 MB and 59.8 thousand tokens/s: the student 1.87 times as fast at
2.298 (2.407 without distillation); the pruned model 1.62 times as fast at 1.973; with int8 it is 6.0× smaller than
the teacher, still at 1.973, and 1.84 times as fast.
"""

from jaxlm.runner.config import default_config

TEACHER = {"steps": 550, "checkpoint_every": 100}
STUDENT = {"steps": 200, "checkpoint_every": 50}
RECOVER = {"steps": 100, "learning_rate": 1e-3, "checkpoint_every": 50}
LEARN = {"name": "distill", "teacher": "teacher", "alpha": 0.7, "temperature": 2.0, "hidden": 0.1}


def get_config():
    config = default_config()
    config.task = "causal"

    config.data.format = "python"
    config.data.train = "stdlib[:40%]"
    config.data.eval = "stdlib[98%:]"
    config.data.tokenizer = "bpe:1024"
    config.data.max_length = 128

    config.model.family = "gpt2"
    config.model.hidden_size = 192
    config.model.num_layers = 4
    config.model.num_heads = 6
    config.model.max_positions = 128

    config.train.batch_size = 16
    config.train.learning_rate = 2e-3
    config.train.schedule = "cosine"
    config.train.final_learning_rate = 0.05
    config.train.warmup = 0.05
    config.train.weight_decay = 0.1
    config.train.b2 = 0.95
    config.train.log_every = 25

    half = {"model": {"num_layers": 2}, "train": STUDENT, "reference": "teacher"}
    config.stages = (
        {
            "name": "teacher",
            "description": "GPT of 4 layers, trained from scratch",
            "train": TEACHER,
        },
        {
            **half,
            "name": "student",
            "description": "half of the depth, trained by distillation: answers with T² and hidden states",
            "losses": (LEARN,),
            "beside": ("student-alone",),
        },
        {
            **half,
            "name": "student-alone",
            "description": "the same half, the same steps, without distillation",
        },
        {
            "name": "prune",
            "description": "half of the FFN units and a third of the heads cut out, recovered by distillation",
            "after": "teacher",
            "reference": "teacher",
            "surgery": ({"name": "prune", "heads": 1 / 3, "ffn": 0.5},),
            "losses": (LEARN,),
            "train": RECOVER,
        },
        {
            "name": "quantize",
            "description": "the pruned model with int8 weights and int8 activations a token",
            "after": "prune",
            "reference": "teacher",
            "beside": ("prune",),
            "surgery": ({"name": "quantize", "dynamic": True},),
            "train": {"steps": 0},
        },
    )
    config.report.title = "Quickstart"
    config.report.corpus = "Python's standard library, the last 2% of its modules in order of a hash of their names"
    config.report.prompt = "def read(self, size=-1):\n"
    config.report.seconds = 10.0
    return config
