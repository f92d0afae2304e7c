"""Made-up measurements: plausible numbers from a random generator, no model was trained for them."""

import numpy as np
import pytest

from jaxlm.evaluate.comparison import Layer, ModelResult
from jaxlm.evaluate.per_example import PerExampleResults
from jaxlm.evaluate.timing import Timing

PIECES, ROUNDS, EXAMPLES = 24, 15, 800


class Maker:
    """Rows that share their held-out pieces and the noise of the machine, as rows of one run do."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.bytes = self.rng.integers(3000, 6000, PIECES)
        self.tokens = self.bytes // 3
        self.hardness = self.rng.normal(1, 0.1, PIECES)
        self.hard, self.truth = self.rng.random(EXAMPLES), self.rng.integers(0, 2, EXAMPLES)
        self.load = self.rng.lognormal(0, 0.1, ROUNDS)

    def held_out(self, bits_per_byte, agreement=None):
        nats = self.bytes * np.log(2) * bits_per_byte * self.hardness * self.rng.normal(1, 0.002, PIECES)
        tokens, sizes = tuple(map(int, self.tokens)), tuple(map(int, self.bytes))
        columns = {"nats": tuple(nats), "tokens": tokens, "bytes": sizes}
        if agreement is not None:
            columns |= {"agreed": tuple(int(agreement * n) for n in tokens), "compared": tokens}
        return PerExampleResults("causal", columns)

    def answers(self, accuracy, seed=1, agreement=None):
        """Two classes; who is right is drawn from what is common to all, so that models err on the same examples."""
        easy, own = self.hard, np.random.default_rng(seed).random(EXAMPLES)
        true = self.truth
        right = 0.8 * easy + 0.2 * own < accuracy
        columns = {
            "true": tuple(map(int, true)),
            "predicted": tuple(int(t if r else 1 - t) for t, r in zip(true, right, strict=True)),
        }
        if agreement is not None:
            columns |= {"agreed": tuple(map(int, own < agreement)), "compared": (1,) * EXAMPLES}
        return PerExampleResults("sequence", columns, classes=2)

    def layers(self, heads, ffn, zeros=0.0, bits=32.0):
        """One layer an entry of `heads`."""
        return tuple(Layer(str(i), h, h, ffn, 64, zeros, bits) for i, h in enumerate(heads))

    def timing(self, seconds):
        return Timing(tuple(seconds * self.load * self.rng.lognormal(0, 0.005, ROUNDS)))

    def row(self, name, megabytes, seconds=None, bits_per_byte=None, **fields):
        if seconds is not None:
            fields |= {"batch": self.timing(seconds), "batch_tokens": 4096, "single": self.timing(seconds / 40)}
        if bits_per_byte is not None:
            fields["held_out"] = self.held_out(bits_per_byte, fields.pop("agreement", None))
        if "accuracy" in fields:
            fields["held_out"] = self.answers(fields.pop("accuracy"), len(name), fields.pop("agreement", None))
        defaults = {
            "description": f"{name}, made up",
            "parameters": int(megabytes * 250_000),
            "parameters_non_embedding": int(megabytes * 200_000),
            "bytes_on_disk": int(megabytes * 1_000_000),
        }
        return ModelResult(name=name, **(defaults | fields))


@pytest.fixture
def make():
    return Maker()


@pytest.fixture
def rows(make):
    """A teacher, a distilled student beside its control, a pruned teacher, and that in int8: smaller, not faster."""
    teacher, left = "teacher", make.layers((4, 4, 3, 4), 384)
    return [
        make.row(
            teacher,
            25.4,
            0.41,
            1.61,
            flops_per_token=13.9e6,
            sample="return x\n",
            prompt="def f(x): ",
            layers=make.layers((6, 6, 6, 6), 768),
            peak_bytes=61_000_000,
            compile_seconds=1.25,
        ),
        make.row(
            "student",
            15.9,
            0.245,
            1.67,
            reference=teacher,
            beside=("control",),
            agreement=0.79,
            layers=make.layers((6, 6), 768),
            facts={"Teacher's cache": "12.5 bytes per token"},
        ),
        make.row("control", 15.9, 0.245, 1.73, reference=teacher, agreement=0.74),
        make.row("prune", 16.4, 0.27, 1.65, reference=teacher, agreement=0.82, flops_per_token=9.3e6, layers=left),
        make.row(
            "int8",
            4.3,
            0.30,
            1.65,
            reference=teacher,
            beside=("prune",),
            bytes_by_dtype={"int8": 4_100_000},
            layers=make.layers((4, 4, 3, 4), 384, zeros=0.02, bits=8.17),
        ),
    ]


@pytest.fixture
def classifiers(make):
    """The same of a classifier: more is better."""
    teacher = "teacher"
    return [
        make.row(teacher, 90.9, 0.41, accuracy=0.914, layers=make.layers((12,) * 6, 1536)),
        make.row("student", 69.5, 0.22, accuracy=0.90, reference=teacher, beside=("control",), agreement=0.95),
        make.row("control", 69.5, 0.22, accuracy=0.86, reference=teacher, agreement=0.9),
        make.row("int8", 23.2, 0.30, accuracy=0.913, reference=teacher, agreement=0.99),
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
        "pieces": "24 batches",
        "intervals": "jackknife",
        "tokens": 36_000,
        "machine": {"processor": "none", "cores": 2},
        "versions": {"jax": "0"},
        "seeds": [0, 1],
        "timing": "15 rounds in turn",
    }
