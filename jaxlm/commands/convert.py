"""Converts a model directory: transformers' to ours or back, another dtype, other shards. Streams one tensor at a time.

    jaxlm convert --from=DIR --to=DIR [--dtype=float32|bfloat16|float16] [--native] [--padded]

The result is in transformers' own layout (config.json, model.safetensors, tokenizer files) wherever transformers can
express the model.
"""

import sys
import time
from pathlib import Path

from absl import flags
from absl.flags import FLAGS


def define_flags() -> None:
    from jaxlm.io.safetensors import MAX_SHARD_BYTES

    flags.DEFINE_string("from", None, "Model directory or hub id to read.", required=True)
    flags.DEFINE_string("to", None, "Directory to write.", required=True)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of float parameters; by default as stored.")
    flags.DEFINE_bool("native", False, "Write jaxlm's own layout even where transformers' would do.")
    flags.DEFINE_bool(
        "padded",
        False,
        "Where transformers cannot express the model's sizes (a pruned BERT's, say), write it once more into "
        "DIR/transformers, padded with zeros: larger, but transformers loads it and its logits are the same.",
    )
    flags.DEFINE_integer("max-shard-bytes", MAX_SHARD_BYTES, "Limit of one file of tensors.")


def main() -> None:
    try:
        print(convert(getattr(FLAGS, "from"), Path(FLAGS.to)))
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")


def convert(source: str, target: Path) -> str:
    """Writes the directory `target`, and says what it is."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from jaxlm.core import arrays
    from jaxlm.io.model_directory import cast, open_model, write_model
    from jaxlm.io.pretrained import find

    started = time.perf_counter()
    lm = open_model(find(source))
    if FLAGS.dtype:
        from ml_dtypes import bfloat16

        lm = cast(lm, bfloat16 if FLAGS.dtype == "bfloat16" else FLAGS.dtype)
    total = sum(tensor.nbytes for tensor in arrays(lm.params).values())
    columns = ("writing", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("writing", total=total)
        reason = write_model(
            target,
            lm,
            native=FLAGS.native,
            padded=FLAGS.padded,
            max_shard_bytes=getattr(FLAGS, "max-shard-bytes"),
            progress=lambda nbytes: progress.advance(bar, nbytes),
        )
    layout = "transformers' layout" if reason is None else f"jaxlm's own layout ({reason})"
    disk = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    sparse = f" ({total / 1e6:.1f} MB with its zeros)" if disk < 0.98 * total else ""
    return (
        f"{target}: {lm.config.family} with the head {lm.config.head!r}, {disk / 1e6:.1f} MB{sparse}, "
        f"{layout}, {time.perf_counter() - started:.1f} s"
    )
