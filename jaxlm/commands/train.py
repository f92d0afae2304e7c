"""Trains one model: pre-training, fine-tuning, distillation, pruning, quantization, as the config says.

    jaxlm train --config=configs/finetune/sequence.py --workdir=runs/sst2 --config.train.epochs=2

A config file may take an argument (`--config=FILE:ARG`) and any of its fields can be set on the command line. A run
that was cut off goes on where it was when the same command is re-run. `workdir/result.json` holds the final
metrics, `workdir/model/` the model directory, `workdir/metrics.jsonl` and `workdir/tensorboard/` the curves.
"""

from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import define_config, start


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("workdir", None, "Where the run lives.", required=True)


def main() -> None:
    import jax

    from jaxlm.runner import stage

    start()
    result = stage.run(FLAGS.config, Path(FLAGS.workdir))
    if jax.process_index():
        return
    for split, metrics in result["metrics"].items():
        print(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(f"model: {FLAGS.workdir}/model   result: {FLAGS.workdir}/result.json")
