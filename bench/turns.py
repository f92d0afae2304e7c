"""What the benchmarks share: two sides in turn on the same cores (A B A B), and how their numbers are put beside
each other."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("jaxlm", "torch")


def in_turn(sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, what: str) -> dict[str, list[dict]]:
    """Measures every side once a round, so that both meet the machine in the same state."""
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            began = time.perf_counter()
            runs[name].append(measure())
            print(f"{what}: {name} {number + 1}/{rounds}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return runs


def program(command: Sequence[str | Path], **environment: str) -> dict[str, Any]:
    """Runs a Python program of this repository and reads the last line it prints as JSON."""
    command = [sys.executable, *map(str, command)]
    cores = str(len(os.sched_getaffinity(0)))
    shared = {"OMP_NUM_THREADS": cores, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **shared, **environment}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now (on Linux; elsewhere its peak)."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else peak_bytes()


def memory(field: str) -> int:
    """A field of the kernel's account of this process, in bytes: VmRSS is resident now, VmHWM its peak (Linux).

    Unlike getrusage's, that peak is not inherited from the process that started this one.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


class Comparison(NamedTuple):
    """One line of a table: a quantity of which less is better, once a round and side.

    Attributes:
      what: what was measured; unit: of the numbers.
      jaxlm, other: in order of rounds.
      against: what the other is.
      floor: the regression threshold of the ratio, if one is set.
    """

    what: str
    unit: str
    jaxlm: Sequence[float]
    other: Sequence[float]
    against: str = "torch"
    floor: float | None = None

    @property
    def below(self) -> bool:
        """Whether the ratio is less than the floor."""
        return self.floor is not None and not self.ratio >= self.floor

    @property
    def ratio(self) -> float:
        """Ratio of medians: how many times less jaxlm needs."""
        return statistics.median(self.other) / statistics.median(self.jaxlm)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of one round."""
        ratios = [other / jaxlm for jaxlm, other in zip(self.jaxlm, self.other, strict=True)]
        return min(ratios), max(ratios)


HEADING = "| | jaxlm | against | ratio of medians | by round | at least |\n|---|---|---|---|---|---|"


def line(row: Comparison) -> str:
    """A row of a Markdown table under `HEADING`. The ratio is other / jaxlm, above 1 where jaxlm needs less."""
    jaxlm, other = (f"{_number(statistics.median(v))} {row.unit}" for v in (row.jaxlm, row.other))
    low, high = row.spread
    spread = f"{_number(low)} to {_number(high)}" if len(row.jaxlm) > 1 else "one round"
    floor = "" if row.floor is None else f"{_number(row.floor)}{', missed' if row.below else ''}"
    return f"| {row.what} | {jaxlm} | {row.against}: {other} | **{_number(row.ratio)}** | {spread} | {floor} |"


def table(rows: Sequence[Comparison]) -> str:
    """All of it."""
    return "\n".join([HEADING, *map(line, rows)])


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "never" if value > 0 else "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def first_reaching(curve: Sequence[tuple[float, float]], target: float, higher: bool) -> float:
    """Seconds of the first point of `[(seconds, score), …]` that is as good as `target`; infinite if none is."""
    good = (lambda score: score >= target) if higher else (lambda score: score <= target)
    return next((seconds for seconds, score in curve if good(score)), math.inf)


def evaluations(workdir: Path, metric: str, began: float) -> list[tuple[float, float]]:
    """The curve of a jaxlm run: seconds since the wall-clock time `began`, and the metric of every evaluation."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["time"] - began, line[metric]) for line in lines if line["split"] == "eval"]


KINDS = ("AVX2", "AVX-512 in halves", "AVX-512")
"""CPUs that differ in what is fast: without AVX-512; with it, computed 256 bits at a time (Zen 4); at full width."""


def kind() -> str:
    """Which of `KINDS` this machine is, or plays by the flags of XLA."""
    from jaxlm.core.cpu import fast_bfloat16

    if not fast_bfloat16():
        return KINDS[0]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return KINDS[2] if " avx_vnni" in flags else KINDS[1]  # which came with units of full width


def machine() -> str:
    """One line about where the numbers were taken."""
    import platform
    from importlib.metadata import version

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    from jaxlm.core.cpu import here

    model = f"{model} ({here() or 'unknown instructions'}; floors of {kind()})"
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers"))
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {packages}, {load}"
