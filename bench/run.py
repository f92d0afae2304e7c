"""Every comparison with torch + transformers, one after the other, and one table of them all.

    python bench/run.py [--data=DIR] [--smoke | --full] [--output=FILE]

DIR holds the folders wnut17, sst2 and tinyshakespeare of docs/data.md (default: the environment variable JAXLM_DATA).
Without it, fine-tuning is left out and the character model reads Python's own library. The default takes about fifteen
minutes on two idle cores; --full adds bfloat16, both fine-tunings at three epochs and several rounds, and takes hours.
--smoke takes less than two minutes: the encoder's step and passes in both types, once; it ends with 1 where a ratio is
below its regression threshold (the last column). Anything else that runs on the machine spoils the numbers; the load is
printed with them.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import characters
import finetune
import step
from turns import HEADING, Comparison, line, machine

FINE_TUNINGS = (("token", "wnut17"), ("sequence", "sst2"))
"""Tasks, and the folders of their data."""


def options_of(program, *values: str) -> argparse.Namespace:
    """A program's options: its defaults, and the given ones."""
    parser = argparse.ArgumentParser()
    program.arguments(parser)
    return parser.parse_args(values)


def measure(data: Path | None, full: bool) -> Iterator[list[Comparison]]:
    """One comparison after the other."""
    yield step.measure(options_of(step, *(["--dtype=both", "--rounds=5"] if full else ["--rounds=2", "--steps=5"])))
    text = [f"--text={data / 'tinyshakespeare' / 'input.txt'}"] if data else []
    yield characters.measure(options_of(characters, *text, *(["--rounds=3"] if full else ["--steps=1000"])))
    if data is None:
        return
    runs = itertools.product(FINE_TUNINGS, ("float32", "bfloat16")) if full else [(FINE_TUNINGS[0], "float32")]
    for (task, folder), dtype in runs:
        options = options_of(finetune, f"--dtype={dtype}", *(["--rounds=3"] if full else ["--epochs=1"]))
        options.task, options.data = task, data / folder
        yield finetune.measure(options)


def smoke() -> Iterator[list[Comparison]]:
    """What shows within two minutes that something became slow."""
    yield step.measure(options_of(step, "--family=bert", "--dtype=both", "--rounds=1", "--steps=5"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("JAXLM_DATA"), help="folder of the data sets")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="the shortest comparison; status 1 if one is lost")
    size.add_argument("--full", action="store_true", help="every comparison, with more rounds")
    parser.add_argument("--output", type=Path, help="write the table there too")
    options = parser.parse_args()
    data = Path(options.data) if options.data else None
    if data and not (data / "wnut17").is_dir():
        parser.error(f"--data={data}: there is no folder wnut17 (docs/data.md says where the data sets come from)")
    lines, below = [machine(), "", HEADING], False
    print(*lines, sep="\n", flush=True)
    for rows in smoke() if options.smoke else measure(data, options.full):
        below = below or any(row.below for row in rows)
        lines += map(line, rows)
        print(*map(line, rows), sep="\n", flush=True)
    if data is None and not options.smoke:
        lines.append("\nNo --data: fine-tuning was left out, and the character model read Python's own library.")
        print(lines[-1])
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    if options.smoke and below:
        sys.exit(1)


if __name__ == "__main__":
    main()
