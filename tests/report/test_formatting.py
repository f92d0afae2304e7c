import math

import pytest

from jaxlm.evaluate.per_example import Estimate
from jaxlm.evaluate.timing import Ratio
from jaxlm.report.formatting import estimate, one_line, plain, printable, scaled, spread, times
from jaxlm.tasks.metrics import accuracy


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (7, "B", "7 B"),
        (999, "B", "999 B"),
        (999.6, "B", "1.00 kB"),
        (999_600, "B", "1.00 MB"),
        (25_392_000, "B", "25.4 MB"),
        (7_000_000_000, "", "7.00 B"),
        (14_000_000_000, "B", "14.0 GB"),
        (None, "B", "—"),
        (math.nan, "", "NaN"),
        (math.inf, "", "∞"),
    ],
)
def test_scaled(value, unit, text):
    assert scaled(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(30.21, "30.2"), (6996.4, "6,996"), (1.2e12, "1.20e+12"), (0.00012, "1.20e-04"), (9.996, "10.0"), (None, "—")],
)
def test_plain(value, text):
    assert plain(value) == text


def test_ratios_and_intervals():
    assert [times(x) for x in (0.9, 1.834, 9.996, 12.36, 123.4)] == ["0.90×", "1.83×", "10.0×", "12.4×", "123×"]
    assert spread(Ratio(1.83, 1.79, 1.88)) == "1.79–1.88"
    assert estimate(Estimate(2.1934, 0.0123)) == "2.193 ± 0.012"
    assert estimate(Estimate(-0.0123, 0.0004), signed=True) == "−0.0123 ± 0.0004"
    assert estimate(Estimate(0.12, None), signed=True) == "+0.120"
    assert estimate(Estimate(math.nan, None)) == "NaN" and estimate(None) == "—"
    assert estimate(Estimate(0.8731, 0.0061), accuracy) == "87.3 ± 0.6%"
    assert estimate(Estimate(-0.0131, 0.0061), accuracy, signed=True) == "−1.3 ± 0.6 points"
    assert estimate(Estimate(23.456, 0.31)) == "23.5 ± 0.3" and estimate(Estimate(6996.2, 31.0)) == "6,996 ± 31.0"


def test_text_of_a_model_cannot_move_the_cursor_or_turn_the_line():
    assert printable("a\tb\n\x1b[31m\x00\u202e\u2066\ud800é日🙂") == "a\tb\n�[31m����é日🙂"
    assert one_line(" a\n\n b\r\n") == "a b"
