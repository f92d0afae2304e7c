"""Loss curves in bfloat16 beside float32: is the difference between types as small as that between seeds?

    python bench/precision.py [--text=input.txt] [--steps=1000] [--seeds=3]

The GPT over characters of bench/characters.py, trained in both types with the same seeds, so with the same batches. At
every evaluation: the validation loss in float32 (mean over seeds, and its standard deviation between seeds), and by how
much the same seed in bfloat16, evaluated in bfloat16 too, is above it (mean and standard error). Ends with 1 where it
is above by more than the deviation between seeds over all evaluations.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from characters import library_text, run_jaxlm
from turns import machine


def curves(text: Path, options: argparse.Namespace, dtype: str, cache: str) -> list[list[float]]:
    """`[seed][evaluation]` losses."""
    losses = []
    for seed in range(options.seeds):
        run = run_jaxlm(text, options.steps, options.every, seed, cache, dtype)
        losses.append([loss for _, loss in run["curve"]])
        print(f"{dtype}, seed {seed}: {losses[-1][-1]:.4f}", file=sys.stderr)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file, tinyshakespeare for example (docs/data.md)")
    parser.add_argument("--steps", type=int, default=1000, help="updates (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 (default: %(default)s)")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: two seeds are the fewest that differ")
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        text = options.text.resolve() if options.text else Path(temporary) / "library.txt"
        if not options.text:
            text.write_text(library_text(), encoding="utf8")
        wide, narrow = (curves(text, options, dtype, f"{temporary}/cache") for dtype in ("float32", "bfloat16"))
    print("| step | float32 | between seeds | bfloat16 above it |\n|---|---|---|---|")
    noise = statistics.mean(statistics.stdev(losses) for losses in zip(*wide, strict=True))
    apart = False
    for number, (full, half) in enumerate(zip(zip(*wide, strict=True), zip(*narrow, strict=True), strict=True)):
        above = [b - a for a, b in zip(full, half, strict=True)]
        mean, apart = statistics.mean(above), apart or statistics.mean(above) > noise
        error = statistics.stdev(above) / len(above) ** 0.5
        step = min((number + 1) * options.every, options.steps)
        print(f"| {step} | {statistics.mean(full):.4f} | {statistics.stdev(full):.4f} | {mean:+.4f} ± {error:.4f} |")
    sys.exit(int(apart))


if __name__ == "__main__":
    main()
