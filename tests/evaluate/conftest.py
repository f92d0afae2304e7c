"""Made-up measurements: plausible numbers from a random generator, no model was trained for them."""

import numpy as np
import pytest

from jaxlm.evaluate.row import HeldOut, Row
from jaxlm.evaluate.timing import Timing

PIECES, ROUNDS = 24, 15


class Maker:
    """Rows that share their held-out pieces and the noise of the machine, as rows of one run do."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.bytes = self.rng.integers(3000, 6000, PIECES)
        self.tokens = self.bytes // 3
        self.hardness = self.rng.normal(1, 0.1, PIECES)
        self.load = self.rng.lognormal(0, 0.1, ROUNDS)

    def held_out(self, bits_per_byte, agreement=None):
        nats = self.bytes * np.log(2) * bits_per_byte * self.hardness * self.rng.normal(1, 0.002, PIECES)
        agreed = None if agreement is None else tuple(int(agreement * n) for n in self.tokens)
        return HeldOut(tuple(nats), tuple(map(int, self.tokens)), tuple(map(int, self.bytes)), agreed)

    def timing(self, seconds):
        return Timing(tuple(seconds * self.load * self.rng.lognormal(0, 0.005, ROUNDS)))

    def row(self, name, megabytes, seconds=None, bits_per_byte=None, **fields):
        if seconds is not None:
            fields |= {"batch": self.timing(seconds), "batch_tokens": 4096, "single": self.timing(seconds / 40)}
        if bits_per_byte is not None:
            fields["held_out"] = self.held_out(bits_per_byte, fields.pop("agreement", None))
        defaults = {
            "description": f"{name}, made up",
            "parameters": int(megabytes * 250_000),
            "parameters_non_embedding": int(megabytes * 200_000),
            "bytes_on_disk": int(megabytes * 1_000_000),
        }
        return Row(name=name, **(defaults | fields))


@pytest.fixture
def make():
    return Maker()


@pytest.fixture
def rows(make):
    """A teacher, a distilled student beside its control, a pruned teacher, and that in int8: smaller, not faster."""
    teacher = "teacher"
    return [
        make.row(teacher, 25.4, 0.41, 1.61, flops_per_token=13.9e6, sample="return x\n", prompt="def f(x): "),
        make.row("student", 15.9, 0.245, 1.67, reference=teacher, beside=("control",), agreement=0.79),
        make.row("control", 15.9, 0.245, 1.73, reference=teacher, agreement=0.74),
        make.row("prune", 16.4, 0.27, 1.65, reference=teacher, agreement=0.82, flops_per_token=9.3e6),
        make.row("int8", 4.3, 0.30, 1.65, reference=teacher, beside=("prune",), bytes_by_dtype={"int8": 4_100_000}),
    ]


NASTY = (
    "</pre><script>alert('x')</script> | *b* [l](javascript:x) `c` ````d\n\x1b[31mred\x00 \u202egnp \ud800 日本 🙂 $t"
)


@pytest.fixture
def awkward(rows, make):
    """The same beside a slow one with a hostile name and sample, a broken one, and one that was only counted."""
    return [
        *rows,
        make.row(
            "a-very-long-name | from *a sweep* over <b>learning rates</b> & seeds: " + "x" * 80,
            30.0,
            0.61,
            1.80,
            description=NASTY,
            reference="teacher",
            prompt="朱雀 `",
            sample=NASTY,
            sample_tokens_per_second=12.3,
        ),
        make.row("broken", 4.3, 0.30, float("nan"), reference="teacher"),
        make.row("counted", 2.3, reference="teacher"),
    ]


@pytest.fixture
def protocol():
    return {
        "corpus": "held-out modules (made up)",
        "tokenizer": "byte-level BPE, 4,096 entries",
        "context": 256,
        "stride": 128,
        "bytes": 108_000,
        "tokens": 36_000,
        "machine": {"processor": "none", "cores": 2},
        "versions": {"jax": "0"},
        "seeds": [0, 1],
        "timing": "15 rounds in turn",
    }
