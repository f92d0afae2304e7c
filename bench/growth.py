"""How the training step of a GPT grows with its depth and with the length of its rows, compiled and run.

    python bench/growth.py [--layers 6 12 24 48] [--lengths 128 512 2048] [--width=256] [--rounds=1]

Layers are scanned, so compilation should cost the same at every depth (1.5 times as much at most, by design), a step
the same for every further layer and, where rows become longer at equal tokens in all, the same for every further
floating-point operation of attention. All are measured in turn, `rounds` times each, without the persistent cache.
"""

import argparse
import os
import statistics
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from step import timed
from turns import machine

from jaxlm.commands.program import large_pages


class Taken(NamedTuple):
    """Seconds: to trace and lower the step, to compile it, and of the step itself."""

    trace: float
    compiling: float
    step: float


def take(layers: int, length: int, tokens: int, width: int, steps: int) -> Taken:
    """Compiles a step of so many tokens, every row a document, and runs it."""
    import time

    import jax
    import jax.numpy as jnp

    from jaxlm.parallel import make_mesh
    from jaxlm.runner.config import default_config
    from jaxlm.runner.dry_run import dry_run
    from jaxlm.train.step import dropout_key

    config = default_config()
    config.data.update(max_length=length, tokenizer="bpe:4096")
    config.model.update(family="gpt2", num_layers=layers, hidden_size=width, num_heads=4, dropout=0.1)
    config.model.max_positions = length
    config.train.update(batch_size=tokens // length)
    jax.clear_caches()
    dry = dry_run(config, make_mesh(devices=jax.devices()[:1]))
    plan = dry.step
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), plan.params)
    state = jax.jit(plan.create, out_shardings=plan.placement)(dropout_key(0), params, {})
    order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), dry.batch["input_ids"].shape)
    values = {"input_ids": order, "segment_ids": jnp.ones_like(order), "positions": order, "labels": order}
    batch = {name: jax.device_put(values[name], shape.sharding) for name, shape in dry.batch.items()}

    began = time.perf_counter()
    lowered = jax.jit(plan.step, donate_argnums=0, out_shardings=(plan.placement, None)).lower(state, {}, batch)
    between = time.perf_counter()
    step = lowered.compile()
    done = time.perf_counter()

    def train() -> None:
        nonlocal state
        state, log = step(state, {}, batch)
        jax.block_until_ready((state, log))

    return Taken(between - began, done - between, statistics.median(timed(train, times=steps)[0]))


def attention(length: int, width: int, layers: int) -> float:
    """Floating-point operations of attention's two products, a token of a training step."""
    return 3 * 4 * width * length * layers


def by_depth(taken: Mapping[int, Taken], tokens: int) -> str:
    """Markdown; a further layer is compared with the smallest depth."""
    lines = ["| layers | trace | compile | step | a token and further layer |", "|---|---|---|---|---|"]
    (least, base), *_ = taken.items()
    for layers, one in taken.items():
        further = (one.step - base.step) / (layers - least) / tokens * 1e6 if layers > least else 0.0
        times = f"{one.trace:.2f} s | {one.compiling:.2f} s | {one.step:.3f} s"
        lines.append(f"| {layers} | {times} | {f'{further:.2f} µs' if further else ''} |")
    deepest = taken[max(taken)]
    ratio = (deepest.trace + deepest.compiling) / (base.trace + base.compiling)
    return "\n".join([*lines, "", f"{max(taken)} layers take {ratio:.2f} times as long to compile as {least}"])


def by_length(taken: Mapping[int, Taken], tokens: int, width: int, layers: int) -> str:
    """Markdown; a further operation of attention is compared with the shortest rows."""
    lines = ["| length | step | a token | a further operation of attention |", "|---|---|---|---|"]
    (least, base), *_ = taken.items()
    for length, one in taken.items():
        work = (attention(length, width, layers) - attention(least, width, layers)) * tokens
        further = f"{(one.step - base.step) / work * 1e12:.2f} ps" if work else ""
        lines.append(f"| {length} | {one.step:.3f} s | {one.step / tokens * 1e6:.1f} µs | {further} |")
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 48], help="depths, at 128 tokens a row")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="of rows, at four layers")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    options = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    large_pages()
    print(machine())
    depths = [(layers, 128, 1024) for layers in sorted(options.layers)]
    rows = [(4, length, 2 * max(options.lengths)) for length in sorted(options.lengths)]
    take(2, 128, 1024, options.width, 1)  # what is slow only once
    taken: dict[tuple[int, int, int], list[Taken]] = {shape: [] for shape in (*depths, *rows)}
    for _, shape in product(range(options.rounds), taken):
        taken[shape].append(take(*shape, options.width, options.steps))
    medians = {shape: Taken(*map(statistics.median, zip(*rounds, strict=True))) for shape, rounds in taken.items()}
    print(by_depth({shape[0]: medians[shape] for shape in depths}, 1024))
    print()
    print(by_length({shape[1]: medians[shape] for shape in rows}, 2 * max(options.lengths), options.width, 4))


if __name__ == "__main__":
    main()
