"""What feeds a training step: encoding beside the bare tokenizers library, packing, and how both grow with the corpus.

    python bench/input.py [--megabytes=16] [--text=FILE] [--rounds=3]

The text is Python's own library, or the paragraphs of a file, repeated until it is long enough; as JSON lines it is
what a pre-training run reads. First, in turn in one process: encoding beside `encode_batch` of the tokenizers library
and beside its faster form without offsets, on the same chunks and threads, their results thrown away; and packing
beside a million tokens a second. Then growth: a sixteenth of the corpus, a quarter and all of it, each in a process of
its own; `memory` is the peak that is resident above what is resident after the imports. `--megabytes=1000` is the full
size.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from turns import Comparison, in_turn, machine, memory, program, table

VOCABULARY, LENGTH, BATCH = 8000, 1024, 32
CHUNK = 1024
TOKENIZERS = {"causal": f"bpe:{VOCABULARY}", "masked": f"wordpiece:{VOCABULARY}"}
PARTS = (16, 4, 1)
"""The corpus divided by these."""


def documents(text: Path | None) -> list[str]:
    """What the corpus repeats."""
    from jaxlm.data import read

    source = read("text", str(text), documents="paragraph") if text else read("python", "stdlib")
    return [record["text"] for record in source]


def repeated(texts: list[str], size: float) -> Iterator[str]:
    """So many characters of them."""
    for text in cycle(texts):
        if size <= 0:
            return
        yield text
        size -= len(text)


# -- beside others, in this process -----------------------------------------------------------------------------------


def encoding(texts: list[str], rounds: int) -> list[Comparison]:
    """The same texts through jaxlm and through the bare library."""
    from jaxlm.data import encode, load_tokenizer
    from jaxlm.data.encoding import chunks

    tokenizer = load_tokenizer(TOKENIZERS["causal"], texts)
    backend = tokenizer.backend_tokenizer

    def bare(run: Any) -> None:
        for chunk in chunks(texts, CHUNK):
            run(chunk, add_special_tokens=False)

    sides = {
        "jaxlm": lambda: encode(tokenizer, texts, special_tokens=False, chunk=CHUNK),
        "encode_batch": lambda: bare(backend.encode_batch),
        "encode_batch_fast": lambda: bare(backend.encode_batch_fast),
    }
    by_side = in_turn({name: partial(seconds, side) for name, side in sides.items()}, rounds, "encoding")
    jaxlm, *others = ([run["seconds"] for run in runs] for runs in by_side.values())
    what = f"encoding {sum(map(len, texts)) / 1e6:.0f} million characters"
    return [Comparison(what, "s", jaxlm, other, name) for name, other in zip(list(sides)[1:], others, strict=True)]


def seconds(function: Any) -> dict[str, float]:
    began = time.perf_counter()
    function()
    return {"seconds": time.perf_counter() - began}


def packing(rounds: int, tokens: int = 4_000_000) -> list[Comparison]:
    """Seconds a million tokens, of joined documents and of whole examples; numpy takes one core for it."""
    import numpy as np

    from jaxlm.data import Examples, Ragged, packed, packed_examples
    from jaxlm.data.ragged import offsets_of

    def ragged(mean: int, longest: int) -> Ragged:
        lengths = np.random.default_rng(0).geometric(1 / mean, tokens // mean).clip(1, longest)
        values = np.arange(lengths.sum(), dtype=np.int64) % VOCABULARY
        return Ragged(values.astype(np.uint16), offsets_of(lengths))

    rows = ragged(24, 128)
    examples = Examples({"input_ids": rows, "labels": rows})
    kinds = {
        "packing documents": packed(ragged(300, LENGTH), BATCH, 0, length=LENGTH),
        "packing whole examples": packed_examples(examples, BATCH, 0, length=128),
    }
    comparisons = []
    for what, batches in kinds.items():
        batches(0)  # plans the epoch
        taken = []
        for number in range(rounds):
            began, count = time.perf_counter(), 0
            for step in range(1 + 20 * number, 21 + 20 * number):
                count += int((batches(step)["segment_ids"] > 0).sum())
            taken.append((time.perf_counter() - began) * 1e6 / count)
        comparisons.append(Comparison(f"{what}, a million tokens", "s", taken, [1.0] * rounds, "to be reached"))
    return comparisons


# -- growth, each in a process of its own -----------------------------------------------------------------------------


def trained(task: str, corpus: Path, tokenizer: Path) -> dict[str, float]:
    """Trains the task's tokenizer on a corpus and saves it."""
    import transformers  # noqa: F401  (a tokenizer is wrapped in its class)

    from jaxlm.data.settings import DataSettings
    from jaxlm.runner.run_setup import choose_tokenizer
    from jaxlm.tasks import TASKS

    settings = DataSettings(format="jsonl", train=str(corpus), tokenizer=TOKENIZERS[task])
    base, began = memory("VmRSS"), time.perf_counter()
    made = choose_tokenizer(settings, TASKS[task], None)
    measured = {"seconds": time.perf_counter() - began, "memory": memory("VmHWM") - base}
    made.save_pretrained(str(tokenizer))
    return measured


def prepared(task: str, corpus: Path, tokenizer: Path) -> dict[str, float]:
    """Prepares a corpus and makes a hundred batches of it; seconds a token."""
    from jaxlm.data import load_tokenizer
    from jaxlm.data.settings import DataSettings
    from jaxlm.tasks import TASKS

    made = load_tokenizer(str(tokenizer))
    settings = DataSettings(format="jsonl", train=str(corpus), max_length=LENGTH)
    base, began = memory("VmRSS"), time.perf_counter()
    data = TASKS[task].prepare(settings.source("train"), made, (), settings)
    encoded, peak = time.perf_counter(), memory("VmHWM")
    tokens = int(data.examples.lengths.sum())
    batches = TASKS[task].batches(data, made, settings, BATCH, 0)
    batches(0)
    planned = time.perf_counter()
    for step in range(1, 101):
        batches(step)
    return {
        "tokens": tokens,
        "seconds": (encoded - began) / tokens,
        "plan": (planned - encoded) / tokens,
        "batch": (time.perf_counter() - planned) / (100 * BATCH * LENGTH),
        "memory": peak - base,
        "batch_memory": memory("VmHWM") - base,
    }


def growth(texts: list[str], megabytes: float) -> str:
    """Two tables in Markdown."""
    training = head("training a tokenizer", "characters", "s a million characters", "memory")
    columns = ("characters", "tokens", "µs a token", "the epoch's plan", "batches", "memory", "with batches")
    preparing = head("preparing for", *columns)
    with tempfile.TemporaryDirectory() as place:
        for part in PARTS:
            corpus, size = Path(place) / "corpus.jsonl", megabytes * 1e6 / part
            with corpus.open("w", encoding="utf8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in repeated(texts, size))
            for task, spec in TOKENIZERS.items():
                command = [__file__, f"--task={task}", f"--corpus={corpus}"]
                run = program([*command, "--measure=trained", f"--tokenizer={place}/{task}-{part}"])
                training.append(line(spec, millions(size), run["seconds"] / size * 1e6, mib(run["memory"])))
                run = program([*command, "--measure=prepared", f"--tokenizer={place}/{task}-{PARTS[0]}"])
                times = [run[key] * 1e6 for key in ("seconds", "plan", "batch")]
                spent = [mib(run[key]) for key in ("memory", "batch_memory")]
                preparing.append(line(task, millions(size), millions(run["tokens"]), *times, *spent))
                print(f"{task}: {millions(size)} characters", file=sys.stderr)
    return "\n".join([*training, "", *preparing])


def head(*cells: str) -> list[str]:
    return [line(*cells), "|---" * len(cells) + "|"]


def line(*cells: str | float) -> str:
    return f"| {' | '.join(cell if isinstance(cell, str) else f'{cell:.3g}' for cell in cells)} |"


def millions(count: float) -> str:
    return f"{count / 1e6:.3g} million"


def mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=float, default=16, help="of the whole corpus (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a text file to repeat")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparisons (default: %(default)s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--measure", choices=["trained", "prepared"], help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TOKENIZERS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = {"trained": trained, "prepared": prepared}[options.measure]
        print(json.dumps(measure(options.task, options.corpus, options.tokenizer)))
        return
    texts = documents(options.text)
    print(machine())
    some = list(repeated(texts, min(options.megabytes / 4, 8) * 1e6))
    print(table(encoding(some, options.rounds) + packing(options.rounds)))
    print(f"\n{growth(texts, options.megabytes)}")


if __name__ == "__main__":
    main()
