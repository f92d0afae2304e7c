"""Measures a model directory, ours or one of transformers, on the eval and test data of a config.

    jaxlm evaluate --model=runs/sst2/model --config=configs/finetune/sequence.py --config.data.test=test.tsv \\
        --workdir=runs/sst2-again

Writes the metrics that training writes for the same model to `workdir/result.json`, and tables to `workdir/report.txt`.
"""

from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import define_config, start


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("model", None, "Model directory or hub id.", required=True)
    flags.DEFINE_string("workdir", None, "Where the result goes.", required=True)


def main() -> None:
    from jaxlm.runner.stage import evaluate

    start()
    result = evaluate(FLAGS.config, FLAGS.model, Path(FLAGS.workdir))
    for split, metrics in result["metrics"].items():
        print(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(f"result: {FLAGS.workdir}/result.json")
