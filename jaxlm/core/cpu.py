"""What the CPU can do that the choice of a computation's form depends on."""

import functools
import os
import re
from pathlib import Path

FLAGS = {
    "AVX2": r"\bavx2\b",
    "AVX512": r"\bavx512f\b",
    "AVX512_VNNI": r"\bavx512_vnni\b",
    "AVX512_BF16": r"\bavx512_bf16\b",
    "AMX": r"\bamx_bf16\b",
}
"""XLA's names of instruction sets, from the oldest on, and what Linux calls them."""


def instruction_set(cpuinfo: str, xla_flags: str = "") -> str:
    """The newest set of instructions that the CPU has and that XLA may use; "" where neither is known.

    >>> instruction_set("flags: avx2 avx512f avx512_bf16"), instruction_set("avx2 avx512f", "--xla_cpu_max_isa=AVX2")
    ('AVX512_BF16', 'AVX2')

    Args:
      cpuinfo: what Linux tells of the processor; xla_flags: the environment variable XLA_FLAGS, whose
        `--xla_cpu_max_isa` plays an older machine.
    """
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", xla_flags)
    known = list(FLAGS)
    newest = known.index(limits[-1].upper()) if limits and limits[-1].upper() in known else len(known) - 1
    found = [name for name, pattern in FLAGS.items() if re.search(pattern, cpuinfo)]
    return next((name for name in reversed(found) if known.index(name) <= newest), "")


@functools.cache
def here() -> str:
    """The `instruction_set` of this process."""
    return instruction_set(_cpuinfo(), os.environ.get("XLA_FLAGS", ""))


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware (Linux tells; elsewhere the answer is no)."""
    return here() in ("AVX512_BF16", "AMX") or re.search(r"\bbf16\b", _cpuinfo()) is not None


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
