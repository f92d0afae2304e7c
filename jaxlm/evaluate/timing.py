"""Wall-clock time of several functions on a noisy machine, compared fairly.

A machine that is busy for a moment slows whoever runs in that moment. So the functions take turns (A B C A B C …), and
they are compared round by round: the ratio of two times from the same round is much steadier than either time.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core.cpu import here

LEAST_ROUNDS = 3
"""Rounds that are measured whatever they cost: quartiles of fewer mean nothing."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one function, one entry a round.

    >>> t = Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    >>> t.median, t.low, t.high, t.iqr
    (3.0, 2.0, 4.0, 2.0)
    """

    seconds: tuple[float, ...]

    def __post_init__(self):
        if not self.seconds:
            raise ValueError("a Timing needs at least one round")

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def low(self) -> float:
        """First quartile."""
        return float(np.quantile(self.seconds, 0.25))

    @property
    def high(self) -> float:
        """Third quartile."""
        return float(np.quantile(self.seconds, 0.75))

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        return self.high - self.low


class Ratio(NamedTuple):
    """Median and quartiles of paired ratios."""

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 15, seconds: float = 30.0
) -> dict[str, Timing]:
    """Times the functions in turn, after one call of each that is not counted (it compiles).

    Args:
      functions: what to time, by name. What a call returns is waited for (`jax.block_until_ready`).
      rounds: rounds to measure.
      seconds: time to spend on them at most; no round is started later than that, except the first `LEAST_ROUNDS`.

    Returns:
      one Timing a function, all with the same number of rounds: entry `i` of each is from round `i`.
    """
    if not functions:
        raise ValueError("interleaved() needs at least one function")
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds is {rounds}; at least {LEAST_ROUNDS} are needed for quartiles")
    for function in functions.values():
        jax.block_until_ready(function())
    taken: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            before = time.perf_counter()
            jax.block_until_ready(function())
            taken[name].append(time.perf_counter() - before)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """`a / b` round by round. With `a` the reference's time, that is how many times as fast as the reference `b` is.

    The rounds must come from the same call of `interleaved`; ValueError when their numbers differ.

    >>> ratio(Timing((2.0, 4.0, 9.0)), Timing((1.0, 2.0, 3.0)))
    Ratio(median=2.0, low=2.0, high=2.5)
    """
    if len(a.seconds) != len(b.seconds):
        raise ValueError(
            f"paired ratios need rounds taken in turn, but there are {len(a.seconds)} and {len(b.seconds)}; "
            "time both in one call of interleaved()"
        )
    quotients = np.divide(a.seconds, b.seconds)
    median, low, high = (float(np.quantile(quotients, q)) for q in (0.5, 0.25, 0.75))
    return Ratio(median, low, high)


def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores this process may use, memory, accelerators."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    description: dict[str, Any] = {
        "processor": f"{_processor()} ({here()})" if here() else _processor(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        description["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    description["devices"] = f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})"
    return description


def versions() -> dict[str, str]:
    """Versions of what computes: Python, jaxlm, jax, jaxlib, flax, numpy."""
    by_package = {"python": platform.python_version()}
    for package in ("jaxlm", "jax", "jaxlib", "flax", "numpy"):
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = "not installed as a package"
    return by_package


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
