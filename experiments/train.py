"""Trains one model: pre-training, fine-tuning, distillation, pruning, quantization, as the config says.

    python experiments/train.py --config=configs/finetune/sequence.py --workdir=runs/sst2 --config.train.epochs=2

A config file may take an argument (`--config=FILE:ARG`) and any of its fields can be set on the command line. A run
that was cut off goes on where it was when the same command is re-run. `workdir/result.json` holds the final
metrics, `workdir/model/` the model directory, `workdir/metrics.jsonl` and `workdir/tensorboard/` the curves.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxlm.runner.cli import run, start

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    import jax

    from jaxlm.runner import stage

    start()
    result = stage.run(CONFIG.value, Path(WORKDIR.value))
    if jax.process_index():
        return
    for split, metrics in result["metrics"].items():
        print(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(f"model: {WORKDIR.value}/model   result: {WORKDIR.value}/result.json")


if __name__ == "__main__":
    run(main)
