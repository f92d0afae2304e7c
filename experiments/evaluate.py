"""Measures a model directory, ours or one of transformers, on the eval and test data of a config.

    python experiments/evaluate.py --model=runs/sst2/model --config=configs/finetune/sequence.py \\
        --config.data.test=test.tsv --workdir=runs/sst2-again

Writes the metrics that training writes for the same model to `workdir/result.json`, and tables to `workdir/report.txt`.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxlm.runner.cli import run, start

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a Python file with get_config().")
MODEL = flags.DEFINE_string("model", None, "Model directory or hub id.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the result goes.")
flags.mark_flags_as_required(["config", "model", "workdir"])


def main() -> None:
    from jaxlm.runner.stage import evaluate

    start()
    result = evaluate(CONFIG.value, MODEL.value, Path(WORKDIR.value))
    for split, metrics in result["metrics"].items():
        print(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(f"result: {WORKDIR.value}/result.json")


if __name__ == "__main__":
    run(main)
