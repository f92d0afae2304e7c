"""Results on a language model: a well-trained GPT over characters, its weights made sparse and rounded in every way.

    python experiments/pipeline.py --config=configs/reproduce/gpt.py --workdir=runs/reproduce/gpt \\
        --config.data.train='DATA/tinyshakespeare/input.txt[:90%]' \\
        --config.data.eval='DATA/tinyshakespeare/input.txt[90%:]'

`make reproduce` runs this and its neighbours. Methods that read text are calibrated on the training part. Hardware: two
CPU cores.
Measured with its neighbours (docs/results.md).
"""

from jaxlm.report.acceptance import Criterion, Results, at_least, at_most, positive
from jaxlm.runner.config import default_config

KERNELS = r".*layers_\d+/.*/kernel"
AFTER = {"after": "dense", "reference": "dense"}
SHORT = {"steps": 600, "learning_rate": 2e-4}
PRUNING = {"sparsity": 0.8, "begin": 0, "end": 400, "every": 20}
TABLE = "runs/reproduce/latency.json"
HALF = {"name": "prune", "ffn": 0.5}
SMALL = {"name": "prune", "heads": 0.5, "ffn": 0.5}
LEARN = {"name": "distill", "teacher": "dense", "alpha": 0.7, "temperature": 2.0, "hidden": 1.0}


def changed(name: str, words: str, *surgery: dict):
    """A stage without training."""
    return {**AFTER, "name": name, "description": words, "surgery": surgery}


def sparse(name: str, method: str, words: str, **options):
    """A stage of one-shot pruning."""
    return changed(name, words, {"name": method, **options})


def rounded(name: str, method: str, bits: str, words: str, group: int | None = None):
    """A stage that rounds the kernels of the layers, by default one scale a channel."""
    options = {"dynamic": False} if method in ("quantize", "gptq") else {}
    return changed(name, words, {"name": method, "bits": bits, "group": group, "targets": KERNELS, **options})


def trained(name: str, words: str, **stage):
    """A stage of as many further steps as the stage `longer` has."""
    return {**AFTER, "name": name, "description": words, "train": SHORT, "beside": ("longer",), **stage}


def zeros(name: str, words: str, method: str, **options):
    """A stage that prunes while it trains; in jaxlm's own layout, where zeros take next to no room."""
    return trained(name, words, methods=({"name": method, **PRUNING, **options},), layout="native")


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
        changed("int8-weights", "int8 weights and tables, products in floats", {"name": "quantize", "dynamic": False}),
        changed("int8", "int8 weights, tables and inputs", {"name": "quantize", "dynamic": True}),
        changed("int8-static", "int8 weights and inputs, one range of inputs for all", {"name": "quantize_static"}),
        changed("int8-smooth", "SmoothQuant, then int8", {"name": "smoothquant"}, {"name": "quantize"}),
        rounded("int4", "quantize", "int4", "4 bits, to the nearest"),
        rounded("gptq", "gptq", "int4", "4 bits, the error passed on"),
        rounded("int4-groups", "quantize", "int4", "4 bits, a scale for 32 weights", 32),
        rounded("gptq-groups", "gptq", "int4", "4 bits, a scale for 32 weights, the error passed on", 32),
        rounded("awq-groups", "awq", "int4", "4 bits, a scale for 32 weights, channels scaled by inputs", 32),
        rounded("nf4", "quantize", "nf4", "4 bits by normal quantiles, a scale for 64 weights", 64),
        rounded("int3", "quantize", "int3", "3 bits, to the nearest"),
        rounded("gptq-int3", "gptq", "int3", "3 bits, the error passed on"),
        changed("mixed", "each matrix in one of several formats", {"name": "mixed_precision", "budget": 0.22}),
        changed("clusters", "16 values a matrix, by k-means", {"name": "cluster", "values": 16}),
        changed("svd", "two factors a matrix, two thirds of its size", {"name": "svd", "size": 2 / 3}),
        changed("svd-inputs", "two factors a matrix, by the inputs", {"name": "activation_svd", "size": 2 / 3}),
        changed("layers", "three layers of four, by block influence", {"name": "drop_layers", "share": 0.25}),
        changed("ffn", "half of the FFN units, by magnitude", HALF),
        changed("ffn-inputs", "half of the FFN units, by activations", {**HALF, "score": "activation"}),
        changed(
            "ffn-taylor",
            "half of the FFN units, by first-order Taylor",
            {**HALF, "score": "taylor"},
        ),
        {**AFTER, "name": "longer", "description": "the dense model, 600 steps more", "train": SHORT},
        trained(
            "qat",
            "4 bits, trained with the roundings",
            methods=({"name": "qat", "bits": "int4", "dynamic": False, "targets": KERNELS},),
        ),
        trained(
            "lsq",
            "4 bits, the scales trained too",
            methods=({"name": "lsq", "bits": "int4", "dynamic": False, "targets": KERNELS},),
        ),
        trained("pact", "int8, bounds of inputs trained", methods=({"name": "pact", "targets": KERNELS},)),
        zeros("magnitude-80", "80% zeros, the smallest weights", "magnitude"),
        zeros("taylor-80", "80% zeros, by weight times gradient", "taylor"),
        zeros("movement-80", "80% zeros, by movement", "movement"),
        zeros("regrow-80", "80% zeros that move", "regrow", gradual=True),
        trained(
            "units",
            "half of heads and FFN units cut out, then distilled",
            surgery=(SMALL,),
            losses=(LEARN,),
        ),
        trained(
            "units-again",
            "half of what was left cut out once more, then distilled again",
            after="units",
            beside=("units-at-once",),
            surgery=(SMALL,),
            losses=(LEARN,),
        ),
        trained(
            "units-at-once",
            "the same quarter left by one cut, distilled for as many steps",
            surgery=({**SMALL, "heads": 0.75, "ffn": 0.75},),
            losses=(LEARN,),
            train={**SHORT, "steps": 2 * SHORT["steps"]},
        ),
        trained(
            "gates",
            "half of heads and FFN units, closed while it is distilled",
            methods=({"name": "structured", "heads": 0.5, "ffn": 0.5, "begin": 0, "end": 300, "every": 20},),
            losses=(LEARN,),
        ),
        trained(
            "gates-learned",
            "half of what gates can remove, learned (L0) while it is distilled",
            methods=({"name": "l0", "size": 0.5, "end": 300},),
            losses=(LEARN,),
        ),
        trained(
            "gates-timed",
            "what the layers do in half of their time on this machine, learned (L0) while it is distilled",
            methods=({"name": "l0", "latency": 0.5, "end": 300, "table": TABLE, "batch_size": 32, "length": 64},),
            losses=(LEARN,),
        ),
        trained(
            "shared",
            "two layers, each in two places, then distilled",
            surgery=({"name": "share", "layer_map": (0, 0, 1, 1)},),
            losses=(LEARN,),
        ),
        trained("lora", "rank 8 on query and value, merged", methods=({"name": "lora"},)),
    )
    config.report.title = "A GPT over characters"
    config.report.corpus = "tinyshakespeare, the last tenth"
    config.report.prompt = "ROMEO:\n"
    config.report.batch_size = 32
    return config


def criteria(results: Results) -> list[Criterion]:
    lower = "lower in bits per byte than"
    return [
        at_most("int8 weights: perplexity, more", results.rise("int8-weights", "dense", "perplexity"), 0.01, "%"),
        at_most("int8 weights and inputs: perplexity, more", results.rise("int8", "dense", "perplexity"), 0.01, "%"),
        at_most("int8: file, of the float32 file", results.bytes("int8", "dense"), 0.30, "%"),
        positive(f"50%: Wanda {lower} magnitude", results.gain("wanda", "magnitude")),
        positive(f"50%: SparseGPT {lower} magnitude", results.gain("sparsegpt", "magnitude")),
        positive(f"2:4: SparseGPT {lower} magnitude", results.gain("sparsegpt-2-4", "magnitude-2-4")),
        positive(f"2:4: SparseGPT {lower} Wanda", results.gain("sparsegpt-2-4", "wanda-2-4")),
        positive(f"4 bits: GPTQ {lower} nearest", results.gain("gptq", "int4")),
        positive(f"3 bits: GPTQ {lower} nearest", results.gain("gptq-int3", "int3")),
        at_least("4 bits: share of the drop that QAT recovers", results.recovered("qat", "int4", "longer"), 0.5, "%"),
        at_least("gates for half of the layers' time: times as fast", results.speed("gates-timed", "dense"), 1.6, "×"),
    ]
