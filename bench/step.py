"""A training step, a forward pass and an answer to one row at fixed shapes, jaxlm beside torch + transformers.

    python bench/step.py [--family=bert|gpt|both] [--dtype=float32|bfloat16|both] [--batch=32] [--length=64]

Each measurement is a process of its own; the two sides alternate. Six layers of width 384: an encoder of 23 million
parameters, and a GPT of the same size. AdamW, dropout on; random tokens, every position real. Further lines compare
jaxlm with itself: int8 with quantized activations and bfloat16 against float32; and a step with what its products alone
would take at the speed of a single large float32 product, timed in the same process. jaxlm runs in large memory pages,
as its programs do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from turns import KINDS, SIDES, Comparison, in_turn, kind, machine, peak_bytes, program, resident_bytes, table

from jaxlm.commands.program import large_pages

LAYERS, WIDTH, HEADS, FFN, VOCAB = 6, 384, 12, 1536, 30522


class Floors(NamedTuple):
    """Regression thresholds for one kind of machine: ratios as they were measured, less the noise of one round.

    Attributes:
      float32, bfloat16: against torch, in the same type; what is not there has no floor.
      products: a float32 step against its products alone; int8: an int8 forward pass against float32; gain: a bfloat16
        step against a float32 one, `None` where the machine has no instructions for bfloat16.
    """

    float32: dict[str, float]
    bfloat16: dict[str, float]
    products: float
    int8: float
    gain: float | None


FLOORS = dict(
    zip(
        KINDS,
        (
            Floors(
                float32={"step": 0.85, "forward": 0.6, "single": 1.0, "steady": 0.75, "peak": 0.83},
                bfloat16={"steady": 0.75, "peak": 0.78},
                products=0.5,
                int8=0.95,
                gain=None,
            ),
            Floors(
                float32={"step": 1.0, "forward": 0.95, "single": 1.2, "steady": 0.75, "peak": 0.83},
                bfloat16={"step": 1.0, "forward": 0.95, "single": 0.95, "steady": 0.75, "peak": 0.78},
                products=0.6,
                int8=1.1,
                gain=1.35,
            ),
            Floors(
                float32={"step": 1.5, "forward": 1.5, "single": 1.4, "steady": 0.75, "peak": 0.83},
                bfloat16={"step": 1.15, "forward": 0.95, "single": 0.9, "steady": 0.75, "peak": 0.78},
                products=0.52,
                int8=1.1,
                gain=1.35,
            ),
        ),
        strict=True,
    )
)
"""By the kind of machine; those of the first are of one real such machine and of a newer one that played it."""


def timed(*functions: Callable[[], None], times: int) -> list[list[float]]:
    """Seconds of each of several calls, after two that are not counted, of one function after the other in turn."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(times + 2):
        for function, calls in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            calls.append(time.perf_counter() - began)
    return [calls[2:] for calls in seconds]


def work(batch: int, length: int, head: int) -> float:
    """Floating point operations of a forward pass: all matrix products, attention, and a head of so many outputs."""
    products = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * FFN) + WIDTH * head
    return batch * length * (2 * products + LAYERS * 4 * WIDTH * length)


def jaxlm_side(family: str, dtype: str, batch: int, length: int, dropout: float, steps: int) -> dict[str, list[float]]:
    """The step that a run of experiments/train.py takes."""
    import jax
    import numpy as np

    from jaxlm.core import Method, MethodInit, arrays
    from jaxlm.io.lm import LM
    from jaxlm.methods.quantize.round_to_nearest import quantize
    from jaxlm.parallel import make_mesh, shard_tree
    from jaxlm.runner.config import default_config
    from jaxlm.runner.dry_run import prepare_dry_run
    from jaxlm.runner.sharded_step import sharded_step
    from jaxlm.train.aot_compile import compiled
    from jaxlm.train.step import dropout_key

    config = default_config()
    config.model.update(vocab_size=VOCAB, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS, ffn_size=FFN)
    config.model.update(dropout=dropout, attention_dropout=dropout)
    if family == "bert":
        config.task, config.data.labels = "sequence", ("0", "1")
        config.model.update(family="bert", max_positions=512, head_dropout=dropout)
    else:
        config.model.update(family="gpt2", max_positions=max(length, 64))
    config.train.update(steps=1000, batch_size=batch, learning_rate=2e-5, schedule="constant", dtype=dtype)
    config.train.update(weight_decay=0.01, clip=0.0)
    setup = prepare_dry_run(config, make_mesh())
    lm = LM.initialize(setup.lm.config, jax.random.key(0))
    plan = sharded_step(setup, Method(), MethodInit(lm), config.train.steps)
    create = jax.jit(plan.create, out_shardings=plan.placement)
    state = create(dropout_key(0), shard_tree(plan.params, arrays(plan.placement.params)), {})

    random = np.random.default_rng(0)
    ids = random.integers(5, VOCAB, (batch, length), dtype=np.int32)
    ones = np.ones_like(ids)
    if family == "bert":
        data = {"input_ids": ids, "attention_mask": ones, "labels": random.integers(0, 2, batch, dtype=np.int32)}
    else:
        order = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        labels = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        data = {"input_ids": ids, "segment_ids": ones, "positions": order, "labels": labels}
    data = jax.device_put(data)

    step = compiled(plan.step, plan.placement, state, {}, [data]).of(data)

    def train() -> None:
        nonlocal state
        state, log = step(state, {}, data)
        jax.block_until_ready((state, log))

    evaluate = jax.jit(lambda params, data: lm.network.forward(params, data, dtype=dtype)["logits"])
    inputs = {name: value for name, value in data.items() if name != "labels"}
    one = {name: value[:1] for name, value in inputs.items()}
    left, right = jax.random.normal(jax.random.key(0), (2, 2048, 2048))
    product = jax.jit(lambda a, b: a @ b)
    measured = {
        "step": timed(train, times=steps)[0],
        "steady": [resident_bytes() / 2**20],
        "peak": [peak_bytes() / 2**20],
        "forward": timed(lambda: evaluate(state.params, inputs).block_until_ready(), times=steps)[0],
        "single": timed(lambda: evaluate(state.params, one).block_until_ready(), times=10 * steps)[0],
        "product": timed(lambda: product(left, right).block_until_ready(), times=10 * steps)[0],
    }
    if dtype == "float32":
        int8 = jax.jit(lm.network.run_view)(quantize(lm).params)
        for name, rows, times in (("", inputs, steps), ("_single", one, 10 * steps)):
            measured[f"int8{name}"], measured[f"beside_int8{name}"] = timed(
                lambda rows=rows: evaluate(int8, rows).block_until_ready(),
                lambda rows=rows: evaluate(state.params, rows).block_until_ready(),
                times=times,
            )
    return measured


def torch_side(family: str, dtype: str, batch: int, length: int, dropout: float, steps: int) -> dict[str, list[float]]:
    """The same network in transformers, bfloat16 by autocast."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: torch.nn.Module
    if family == "bert":
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=FFN,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                n_inner=FFN,
                n_positions=max(length, 64),
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
        )
    ids = torch.randint(5, VOCAB, (batch, length))
    labels = torch.randint(0, 2, (batch,)) if family == "bert" else ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")  # noqa: E731

    def train() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()

    def evaluate(ids: torch.Tensor) -> None:
        with torch.inference_mode(), autocast():
            model(input_ids=ids)

    model.train()
    step = timed(train, times=steps)[0]
    measured = {"step": step, "steady": [resident_bytes() / 2**20], "peak": [peak_bytes() / 2**20]}
    model.eval()
    measured["forward"] = timed(lambda: evaluate(ids), times=steps)[0]
    measured["single"] = timed(lambda: evaluate(ids[:1]), times=10 * steps)[0]
    return measured


def compare(family: str, dtype: str, options: argparse.Namespace) -> list[Comparison]:
    """Both sides in turn: rows of the table."""
    name = "encoder" if family == "bert" else "GPT"
    what = f"{name}, {dtype}, {options.batch} × {options.length}"
    shapes = [f"--{key}={getattr(options, key)}" for key in ("batch", "length", "dropout", "steps")]
    command = [__file__, f"--family={family}", f"--dtype={dtype}", *shapes]
    runs = in_turn(
        {side: lambda side=side: program([*command, f"--side={side}"]) for side in SIDES}, options.rounds, what
    )

    def of(side: str, name: str) -> list[float]:
        return [statistics.median(run[name]) for run in runs[side]]

    kinds = {
        "step": ("training step", "s"),
        "forward": ("forward pass", "s"),
        "single": ("one row", "s"),
        "steady": ("memory while training", "MiB"),
        "peak": ("peak memory, compilation included", "MiB"),
    }
    floors = FLOORS[kind()]
    by_dtype = floors.float32 if dtype == "float32" else floors.bfloat16
    rows = [
        Comparison(f"{label}: {what}", unit, of("jaxlm", name), of("torch", name), floor=by_dtype.get(name))
        for name, (label, unit) in kinds.items()
    ]
    step = work(options.batch, options.length, VOCAB if family == "gpt" else 0) * 3
    ceiling = [step / (2 * 2048**3) * seconds for seconds in of("jaxlm", "product")]
    rest = floors.products if dtype == "float32" else None
    rows.append(Comparison(f"training step: {what}", "s", of("jaxlm", "step"), ceiling, "float32 products alone", rest))
    if dtype == "float32":
        for name, label, floor in (("", "int8 forward", floors.int8), ("_single", "int8, one row", None)):
            int8, wide = of("jaxlm", f"int8{name}"), of("jaxlm", f"beside_int8{name}")
            rows.append(Comparison(f"{label}: {what}", "s", int8, wide, "float32, in turn", floor))
    return rows


def bfloat16_gain(rows: Sequence[Comparison], family: str) -> list[Comparison]:
    """bfloat16 against float32, where both were measured."""
    name = "encoder" if family == "bert" else "GPT"
    gains = []
    for label in ("training step", "forward pass"):
        two = [r for r in rows if r.what.startswith(f"{label}: {name}") and r.against == "torch"]
        if len(two) == 2:
            floor = FLOORS[kind()].gain if label == "training step" else None
            gains.append(Comparison(two[1].what, "s", two[1].jaxlm, two[0].jaxlm, "float32", floor))
    return gains


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=["bert", "gpt", "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="float32")
    parser.add_argument("--batch", type=int, default=32, help="rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens a row (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=7, help="timed calls a process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side (default: %(default)s)")


def measure(options: argparse.Namespace) -> list[Comparison]:
    """All the families and types that the options name."""
    families = ["bert", "gpt"] if options.family == "both" else [options.family]
    dtypes = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
    rows = [row for family in families for dtype in dtypes for row in compare(family, dtype, options)]
    return rows + [row for family in families for row in bfloat16_gain(rows, family)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if options.side == "jaxlm":
            large_pages()
        side = jaxlm_side if options.side == "jaxlm" else torch_side
        shapes = (options.batch, options.length, options.dropout, options.steps)
        print(json.dumps(side(options.family, options.dtype, *shapes)))
        return
    print(machine())
    print(table(measure(options)))


if __name__ == "__main__":
    main()
