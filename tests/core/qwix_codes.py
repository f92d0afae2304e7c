"""Writes qwix_codes.json: a matrix, and the codes, scales and zero points that qwix gives for it.

    pip install --no-deps --target ELSEWHERE qwix==0.1.8
    PYTHONPATH=ELSEWHERE python tests/core/qwix_codes.py

qwix is not among the requirements of the tests: it runs once, and the tests read its results.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import qwix

FILE = Path(__file__).with_name("qwix_codes.json")
FORMATS = {"int8": jnp.int8, "int4": jnp.int4, "int3": "int3"}
FORMATS |= {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2, "nf4": "nf4"}
ASYMMETRIC = ("int8", "int4")
GROUPS = (None, 4)
"""Rows that share a scale; `None`: all of a column."""


def listed(a: jnp.ndarray | None, kind: type) -> list | None:
    """Rows of plain numbers."""
    return None if a is None else [[kind(x) for x in row] for row in np.asarray(a, np.float32)]


def case(w: jnp.ndarray, bits: str, group: int | None, symmetric: bool) -> list:
    """Format, rows of a group, whether symmetric; scales, zero points or `None`, codes."""
    quantized = qwix.quantize(
        w,
        FORMATS[bits],
        channelwise_axes=[1],
        tiled_axes={0: group} if group else {},
        calibration_method="absmax" if symmetric else "minmax",
    )
    number = float if "fp8" in bits else int
    return [
        bits,
        group,
        symmetric,
        listed(quantized.scale, float),
        listed(quantized.zero_point, int),
        listed(quantized.qvalue, number),
    ]


def main() -> None:
    sixteenths = json.loads(FILE.read_text())["w"]
    w = jnp.asarray(sixteenths, jnp.float32) / 16
    cases = [
        case(w, bits, group, symmetric)
        for bits in FORMATS
        for group in GROUPS
        for symmetric in ((True, False) if bits in ASYMMETRIC else (True,))
    ]
    lines = ",\n".join(json.dumps(row) for row in cases)
    FILE.write_text(f'{{"w": {json.dumps(sixteenths)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
