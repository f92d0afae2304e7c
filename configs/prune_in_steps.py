"""Pruning far: three quarters of the FFN units and two thirds of the heads of a small GPT go in two steps, each with
distillation from the whole after it; beside it the same cut at once with as many steps of recovery.

    python experiments/pipeline.py --config=configs/prune_in_steps.py --workdir=runs/prune_in_steps

After a large cut the scores of the dense model no longer say what the small one needs, which speaks for pruning,
recovering and scoring again; a recovery cut in two speaks against it, and this measures which counts for more. To
start from a model of your own, put its directory into `config.model.init` and drop the first stage. Hardware: two CPU
cores.
Measured: in two steps 1.960 bits per byte, at once 1.953, the whole 1.975, 2.9 times as fast either way: a model that
was trained as briefly as this one has enough to spare, and steps win nothing.
"""

from jaxlm.runner.config import default_config

TEACHER = {"steps": 550, "checkpoint_every": 100}
RECOVER = {"steps": 150, "learning_rate": 1e-3, "checkpoint_every": 50}
LEARN = {"name": "distill", "teacher": "teacher", "alpha": 0.7, "temperature": 2.0}


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

    learned = {"reference": "teacher", "losses": (LEARN,)}
    config.stages = (
        {
            "name": "teacher",
            "description": "GPT of 4 layers, trained from scratch",
            "train": TEACHER,
        },
        {
            **learned,
            "name": "half",
            "description": "half of the FFN units and a third of the heads cut out, recovered by distillation",
            "after": "teacher",
            "surgery": ({"name": "prune", "heads": 1 / 3, "ffn": 0.5},),
            "train": RECOVER,
        },
        {
            **learned,
            "name": "quarter",
            "description": "half of what was left of both cut out, recovered again",
            "after": "half",
            "beside": ("at-once",),
            "surgery": ({"name": "prune", "heads": 0.5, "ffn": 0.5},),
            "train": RECOVER,
        },
        {
            **learned,
            "name": "at-once",
            "description": "the same sizes in one cut, recovered as long as both steps together",
            "after": "teacher",
            "surgery": ({"name": "prune", "heads": 2 / 3, "ffn": 0.75},),
            "train": {**RECOVER, "steps": 2 * RECOVER["steps"]},
        },
    )
    config.report.title = "Pruning in steps"
    config.report.corpus = "Python's standard library, the last 2% of its modules in order of a hash of their names"
    config.report.prompt = "def read(self, size=-1):\n"
    config.report.seconds = 10.0
    return config
