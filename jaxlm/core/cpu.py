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
"""XLA's names of instruction sets, oldest first, and their flags in /proc/cpuinfo."""


def instruction_set(cpuinfo: str, xla_flags: str = "") -> str:
    """The newest set of instructions that the CPU has and that XLA may use; "" where none of `FLAGS` is.

    >>> instruction_set("flags: avx2 avx512f avx512_bf16"), instruction_set("avx2 avx512f", "--xla_cpu_max_isa=AVX2")
    ('AVX512_BF16', 'AVX2')

    Args:
      cpuinfo: the contents of /proc/cpuinfo.
      xla_flags: the environment variable XLA_FLAGS, whose `--xla_cpu_max_isa` limits XLA to an older machine's set.
    """
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", xla_flags)
    names = list(FLAGS)
    newest = names.index(limits[-1].upper()) if limits and limits[-1].upper() in names else len(names) - 1
    supported = [name for name in names if re.search(FLAGS[name], cpuinfo)]
    return next((name for name in reversed(supported) if names.index(name) <= newest), "")


@functools.cache
def here() -> str:
    """The `instruction_set` of this process."""
    return instruction_set(_cpuinfo(), os.environ.get("XLA_FLAGS", ""))


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware (false without a /proc/cpuinfo)."""
    return here() in ("AVX512_BF16", "AMX") or re.search(r"\bbf16\b", _cpuinfo()) is not None


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
