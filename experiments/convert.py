"""Converts a model directory: transformers' to ours or back, another dtype, other shards. Streams one tensor at a time.

python experiments/convert.py --from=DIR --to=DIR [--dtype=float32|bfloat16|float16] [--native] [--padded]
"""

import argparse
import sys
import time
from pathlib import Path

from jaxlm.core import arrays
from jaxlm.io.model_directory import cast, open_model, write_model
from jaxlm.io.pretrained import find
from jaxlm.io.safetensors import MAX_SHARD_BYTES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Convert a model directory, one tensor at a time. The result is in transformers' own layout "
        "(config.json, model.safetensors, tokenizer files) wherever transformers can express the model.",
    )
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="model directory or hub id to read")
    parser.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of float parameters (default: as stored)"
    )
    parser.add_argument(
        "--native", action="store_true", help="write jaxlm's own layout even where transformers' would do"
    )
    parser.add_argument(
        "--padded",
        action="store_true",
        help="where transformers cannot express the model's sizes (a pruned BERT's, say), write it once more into "
        "DIR/transformers, padded with zeros: larger, but transformers loads it and its logits are the same",
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=MAX_SHARD_BYTES,
        metavar="N",
        help="limit of one file of tensors (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    started = time.perf_counter()
    lm = open_model(find(options.source))
    if options.dtype:
        from ml_dtypes import bfloat16

        lm = cast(lm, bfloat16 if options.dtype == "bfloat16" else options.dtype)
    total = sum(tensor.nbytes for tensor in arrays(lm.params).values())
    columns = ("writing", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("writing", total=total)
        reason = write_model(
            options.target,
            lm,
            native=options.native,
            padded=options.padded,
            max_shard_bytes=options.max_shard_bytes,
            progress=lambda nbytes: progress.advance(bar, nbytes),
        )
    layout = "transformers' layout" if reason is None else f"jaxlm's own layout ({reason})"
    disk = sum(file.stat().st_size for file in options.target.glob("*.safetensors"))
    sparse = f" ({total / 1e6:.1f} MB with its zeros)" if disk < 0.98 * total else ""
    print(
        f"{options.target}: {lm.config.family} with the head {lm.config.head!r}, {disk / 1e6:.1f} MB{sparse}, "
        f"{layout}, {time.perf_counter() - started:.1f} s"
    )


def main() -> int:
    options = parse()
    try:
        convert(options)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
