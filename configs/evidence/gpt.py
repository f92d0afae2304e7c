"""Evidence on a language model: a well-trained GPT over characters, its weights made sparse and rounded in every way.

    python experiments/pipeline.py --config=configs/evidence/gpt.py --workdir=runs/evidence/gpt \\
        --config.data.train='DATA/tinyshakespeare/input.txt[:90%]' \\
        --config.data.eval='DATA/tinyshakespeare/input.txt[90%:]'

`make evidence` runs this and its neighbours. Methods that read text are calibrated on the training part. Hardware: two
CPU cores.
Not measured yet.
"""

from jaxlm.build.config import default_config
from jaxlm.evaluate.claims import Claim, Evidence, at_least, at_most, positive

KERNELS = r".*layers_\d+/.*/kernel"
AFTER = {"after": "dense", "reference": "dense"}


def sparse(name: str, method: str, words: str, **options):
    """A stage of one-shot pruning."""
    return {**AFTER, "name": name, "description": words, "surgery": ({"name": method, **options},)}


def rounded(name: str, method: str, bits: str, words: str):
    """A stage that rounds the kernels of the layers, one scale a channel."""
    surgery = {"name": method, "bits": bits, "group": None, "dynamic": False, "targets": KERNELS}
    return {**AFTER, "name": name, "description": words, "surgery": (surgery,)}


def get_config():
    config = default_config()
    config.task = "causal"

    config.data.format = "text"
    config.data.train = "DATA/tinyshakespeare/input.txt[:90%]"
    config.data.eval = "DATA/tinyshakespeare/input.txt[90%:]"
    config.data.tokenizer = "character"
    config.data.max_length = 64

    config.model.family = "gpt2"
    config.model.hidden_size = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.max_positions = 64

    config.train.batch_size = 12
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.final_learning_rate = 0.1
    config.train.warmup = 100
    config.train.weight_decay = 0.1
    config.train.b2 = 0.99
    config.train.clip = 1.0

    config.stages = (
        {"name": "dense", "description": "GPT of 4 layers, from scratch", "train": {"steps": 6000}},
        sparse("magnitude", "magnitude", "half of the weights, the smallest", sparsity=0.5),
        # Ranked over a matrix as the others are: over each output alone both it and magnitude lose more on this model.
        sparse("wanda", "wanda", "half of the weights, by size and inputs", sparsity=0.5, per="matrix"),
        sparse("sparsegpt", "sparsegpt", "half of the weights, the others made up for it", sparsity=0.5),
        sparse("magnitude-2-4", "magnitude", "two of four weights, the smallest", pattern="2:4"),
        sparse("wanda-2-4", "wanda", "two of four weights, by size and inputs", pattern="2:4"),
        sparse("sparsegpt-2-4", "sparsegpt", "two of four weights, the others made up for it", pattern="2:4"),
        {
            **AFTER,
            "name": "int8-weights",
            "description": "int8 weights and tables, products in floats",
            "surgery": ({"name": "quantize", "dynamic": False},),
        },
        {
            **AFTER,
            "name": "int8",
            "description": "int8 weights, tables and inputs",
            "surgery": ({"name": "quantize", "dynamic": True},),
        },
        rounded("int4", "quantize", "int4", "4 bits, to the nearest"),
        rounded("gptq", "gptq", "int4", "4 bits, the error passed on"),
        rounded("int3", "quantize", "int3", "3 bits, to the nearest"),
        rounded("gptq-int3", "gptq", "int3", "3 bits, the error passed on"),
        {
            **AFTER,
            "name": "qat",
            "description": "4 bits, trained with the roundings",
            "beside": ("int4",),
            "methods": ({"name": "qat", "bits": "int4", "dynamic": False, "targets": KERNELS},),
            "train": {"steps": 600, "learning_rate": 2e-4},
        },
    )
    config.report.title = "A GPT over characters"
    config.report.corpus = "tinyshakespeare, the last tenth"
    config.report.prompt = "ROMEO:\n"
    config.report.batch_size = 32
    return config


def claims(found: Evidence) -> list[Claim]:
    lower = "lower in bits per byte than"
    return [
        at_most("int8 weights: perplexity, more", found.rise("int8-weights", "dense", "perplexity"), 0.01, "%"),
        at_most("int8 weights and inputs: perplexity, more", found.rise("int8", "dense", "perplexity"), 0.01, "%"),
        at_most("int8: file, of the float32 file", found.bytes("int8", "dense"), 0.30, "%"),
        positive(f"50%: Wanda {lower} magnitude", found.gain("wanda", "magnitude")),
        positive(f"50%: SparseGPT {lower} magnitude", found.gain("sparsegpt", "magnitude")),
        positive(f"2:4: SparseGPT {lower} magnitude", found.gain("sparsegpt-2-4", "magnitude-2-4")),
        positive(f"2:4: SparseGPT {lower} Wanda", found.gain("sparsegpt-2-4", "wanda-2-4")),
        positive(f"4 bits: GPTQ {lower} nearest", found.gain("gptq", "int4")),
        positive(f"3 bits: GPTQ {lower} nearest", found.gain("gptq-int3", "int3")),
        at_least("4 bits: training wins back of the loss", found.recovered("qat", "int4", "dense"), 0.5, "%"),
    ]
