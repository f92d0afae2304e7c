"""A small GPT on the characters of a text, jaxlm beside torch + transformers: validation loss against seconds.

    python bench/characters.py [--text=input.txt] [--steps=2000]

Four layers of width 128, rows of 64 characters, batches of 12, no dropout; the first 90% of the text train, every full
window of the rest is scored. jaxlm runs experiments/train.py with configs/pretrain/gpt.py:characters. Seconds count
from the start of the process: imports, compilation, training and the evaluations, which both sides do equally often.
Without --text the text is a million characters of the Python installation's own library.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

from turns import (
    ROOT,
    SIDES,
    Comparison,
    evaluations,
    first_reaching,
    in_turn,
    machine,
    peak_bytes,
    program,
    table,
)

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 128, 4, 4, 64, 12
RATE, WARMUP = 1e-3, 100


def torch_side(text: Path, steps: int, every: int, seed: int, began: float) -> dict:
    """The same network, data and schedule in transformers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    characters = text.read_text(encoding="utf8")
    numbers = {character: i for i, character in enumerate(sorted(set(characters)))}
    ids = torch.tensor([numbers[character] for character in characters])
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(numbers),
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.1)

    def rate(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def loss(windows):
        logits = model(input_ids=windows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    windows = held_out[: (len(held_out) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)

    @torch.inference_mode()
    def validate() -> float:
        return sum(loss(part).item() * len(part) for part in windows.split(BATCH)) / len(windows)

    curve = []
    for number in range(1, steps + 1):
        starts = torch.randint(len(train) - LENGTH, (BATCH,))
        value = loss(torch.stack([train[i : i + LENGTH + 1] for i in starts]))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % every == 0 or number == steps:
            curve.append((time.time() - began, validate()))
    return {"curve": curve, "peak_bytes": peak_bytes()}


def run_jaxlm(text: Path, steps: int, every: int, seed: int, cache: str, dtype: str = "float32") -> dict:
    with tempfile.TemporaryDirectory() as place:
        began = time.time()
        program(
            [
                ROOT / "experiments" / "train.py",
                f"--config={ROOT / 'configs' / 'pretrain' / 'gpt.py'}:characters",
                f"--workdir={place}/run",
                f"--config.seed={seed}",
                f"--config.data.train={text}[:90%]",
                f"--config.data.eval={text}[90%:]",
                f"--config.train.steps={steps}",
                f"--config.train.eval_every={every}",
                f"--config.train.dtype={dtype}",
            ],
            JAX_COMPILATION_CACHE_DIR=cache,
        )
        seconds = time.time() - began
        result = json.loads((Path(place) / "run" / "result.json").read_text())
        curve = evaluations(Path(place) / "run", "loss", began)
        return {"curve": curve, "peak_bytes": result["peak_memory_bytes"], "seconds": seconds}


def run_torch(text: Path, steps: int, every: int, seed: int) -> dict:
    began = time.time()
    numbers = [f"--text={text}", f"--steps={steps}", f"--every={every}", f"--seed={seed}", f"--began={began}"]
    return program([__file__, "--side=torch", *numbers]) | {"seconds": time.time() - began}


def library_text() -> str:
    """A million characters of Python's library, ASCII only: the text where none is named."""
    from jaxlm.data import read

    whole = "\n".join(record["text"] for record in read("python", "stdlib[:15%]"))
    return "".join(character for character in whole if character.isascii())[:1_000_000]


def measure(options: argparse.Namespace) -> list[Comparison]:
    """Runs both sides in turn; the first jaxlm run, which compiles, is a row of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        text = options.text.resolve() if options.text else Path(temporary) / "library.txt"
        if not options.text:
            text.write_text(library_text(), encoding="utf8")
        seeds = iter(range(1000))
        shared = (text, options.steps, options.every)
        cold = run_jaxlm(*shared, next(seeds), f"{temporary}/cache")
        runs = in_turn(
            {
                "jaxlm": lambda: run_jaxlm(*shared, next(seeds), f"{temporary}/cache"),
                "torch": lambda: run_torch(*shared, next(seeds)),
            },
            options.rounds,
            "characters",
        )
    final = {side: [run["curve"][-1][1] for run in runs[side]] for side in SIDES}
    target = max(statistics.median(losses) for losses in final.values())
    reached = {side: [first_reaching(run["curve"], target, higher=False) for run in runs[side]] for side in SIDES}
    memory = {side: [run["peak_bytes"] / 2**20 for run in runs[side]] for side in SIDES}
    what, whole = f"characters, {options.steps} steps", {s: [run["seconds"] for run in runs[s]] for s in SIDES}
    return [
        Comparison(f"{what}: final validation loss", "nats", final["jaxlm"], final["torch"]),
        Comparison(f"{what}: to a loss of {target:.4f}", "s", reached["jaxlm"], reached["torch"], floor=1.25),
        Comparison(f"{what}: the whole run", "s", whole["jaxlm"], whole["torch"]),
        Comparison(f"{what}: the whole run, compile cache empty", "s", [cold["seconds"]], whole["torch"][:1]),
        Comparison(f"{what}: peak memory", "MiB", memory["jaxlm"], memory["torch"]),
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="a text file, tinyshakespeare for example (docs/data.md)")
    parser.add_argument("--steps", type=int, default=2000, help="updates (default: %(default)s)")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs a side (default: %(default)s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    for name, kind in (("side", str), ("seed", int), ("began", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(torch_side(options.text, options.steps, options.every, options.seed, options.began)))
        return
    print(machine())
    print(table(measure(options)))


if __name__ == "__main__":
    main()
