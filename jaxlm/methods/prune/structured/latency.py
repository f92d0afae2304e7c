"""A table of what heads and FFN units cost in seconds on this machine, measured once and kept in a file."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core import Network

DEPTH = 4
"""Layers of the measured stacks: so many that what is not a layer hardly counts."""


class Curve(NamedTuple):
    """Seconds by count; a straight line between the counts, and on below the first, so that it always has a slope.

    >>> [float(Curve((1, 3), (0.0, 4.0))(jnp.float32(count))) for count in (0.5, 2.0, 3.0)]
    [-1.0, 2.0, 4.0]
    """

    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, count: Float[Array, ""]) -> Float[Array, ""]:
        counts, seconds = jnp.array(self.counts, jnp.float32), jnp.array(self.seconds, jnp.float32)
        slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0]) if len(self.counts) > 1 else 0.0
        return jnp.interp(count, counts, seconds) + slope * jnp.minimum(count - counts[0], 0.0)


class Table(NamedTuple):
    """Seconds of one layer: `layer + heads(number of heads) + ffn(number of units)`.

    Attributes:
      layer: of a layer with one head and one unit.
      heads: what more heads add (KV groups; the query heads of a single group); ffn: what more units add.
      of: what was measured: structure, shape of the batch and machine, see `describe`.
    """

    layer: float
    heads: Curve
    ffn: Curve
    of: Mapping[str, Any]


def describe(network: Network, batch_size: int, length: int) -> dict[str, Any]:
    """What a table is a table of."""
    config = network.config
    return {
        "family": config.family,
        "hidden": config.hidden_size,
        "head_dim": config.head_dim,
        "groups": max(config.num_kv_heads),
        "queries": max(h // max(kv, 1) for h, kv in zip(config.num_heads, config.num_kv_heads, strict=True)),
        "ffn": max(config.ffn_size),
        "gated": config.gated,
        "batch_size": batch_size,
        "length": length,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def table_at(path: str, network: Network, batch_size: int, length: int) -> Table:
    """The table in a file, or measured and written there.

    Raises:
      ValueError: the file holds a table of something else, or the model has two stacks.
    """
    if network.config.encoder_decoder:
        raise ValueError("latency: an encoder-decoder has two lengths and no single time; use a target size")
    described, file = describe(network, batch_size, length), Path(path)
    if not file.exists():
        with jax.ensure_compile_time_eval():  # also where shapes are traced
            table = measure(network, batch_size, length)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.part")
        unfinished.write_text(
            json.dumps({**table._asdict(), "heads": list(table.heads), "ffn": list(table.ffn)}, indent=2)
        )
        os.replace(unfinished, file)
    stored = json.loads(file.read_text())
    for name, value in described.items():
        if stored["of"].get(name) != value:
            raise ValueError(
                f"{path} was measured with {name} {stored['of'].get(name)!r}, here it is {value!r}; name another file "
                "as the table"
            )
    curves = {name: Curve(*(tuple(values) for values in stored[name])) for name in ("heads", "ffn")}
    return Table(stored["layer"], curves["heads"], curves["ffn"], stored["of"])


def measure(network: Network, batch_size: int, length: int, points: int = 6, rounds: int = 9) -> Table:
    """Times stacks of equal layers with more and more heads, and with more and more units, in turn.

    The shortest of several rounds counts: what else runs on the machine only adds. A curve never falls.
    """
    about = describe(network, batch_size, length)
    groups, queries = about["groups"], about["queries"]
    multi_query = groups == 1 and queries > 1
    heads, units = grid(queries if multi_query else groups, points), grid(about["ffn"], points)

    def stack(heads: int, units: int) -> Callable[[], jax.Array]:
        shape = (1, heads) if multi_query else (heads, queries)
        return _stack(network, *shape, units=units, batch_size=batch_size, length=length)

    # Each is compiled first, and then all are timed in turn.
    runs = {("heads", n): stack(n, 1) for n in heads} | {("ffn", n): stack(1, n) for n in units if n > 1}
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - started)
    least = best["heads", 1]
    best["ffn", 1] = least

    def curve(kind: str, counts: tuple[int, ...]) -> Curve:
        more = np.maximum.accumulate([(best[kind, n] - least) / DEPTH for n in counts])
        return Curve(counts, tuple(float(max(seconds, 0.0)) for seconds in more))

    return Table(least / DEPTH, curve("heads", heads), curve("ffn", units), about)


def grid(largest: int, points: int) -> tuple[int, ...]:
    """Counts from 1 to `largest`.

    >>> grid(12, 4)
    (1, 5, 8, 12)
    """
    return tuple(sorted({round(n) for n in np.linspace(1, largest, points)}))


def _stack(
    network: Network, groups: int, queries: int, *, units: int, batch_size: int, length: int
) -> Callable[[], jax.Array]:
    """A forward pass through equal layers alone: no vocabulary, no head.

    Args:
      groups, queries: KV groups, and the query heads of each.
    """
    config = network.config.replace(
        vocab_size=8,
        head="none",
        next_sentence=False,
        num_layers=DEPTH,
        num_heads=groups * queries,
        num_kv_heads=groups,
        ffn_size=units,
        position_heads=None,
        dropout=0.0,
    )
    small = network.replace(config)
    params = jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), small.run_view(small.abstract()))
    batch = {"input_ids": jnp.ones((batch_size, length), jnp.int32)}
    forward = jax.jit(lambda params, batch: small.forward(params, batch)["last_hidden"])
    return lambda: forward(params, batch)
