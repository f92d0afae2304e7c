"""Numbers and foreign text made readable: units, intervals, and whatever a model wrote."""

import math
import unicodedata

from jaxlm.evaluate.per_example import Estimate
from jaxlm.evaluate.timing import Ratio
from jaxlm.tasks import Metric

NOT_MEASURED = "—"


def scaled(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix.

    >>> scaled(4_214_000), scaled(812_544, "B"), scaled(950), scaled(None)
    ('4.21 M', '813 kB', '950', '—')
    """
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return plain(value)
    prefixes = ("", "k", "M", "G" if unit else "B", "T")
    step = 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    if step == 0 and value == int(value):
        return f"{int(value)} {unit}".strip()
    return f"{_three(value)} {prefixes[step]}{unit}".strip()


def plain(value: float | None) -> str:
    """Three significant digits, without a prefix: perplexities, milliseconds.

    >>> plain(23.456), plain(6996.2), plain(0.01234), plain(float("nan"))
    ('23.5', '6,996', '0.0123', 'NaN')
    """
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:.2e}" if abs(value) >= 1e7 or 0 < abs(value) < 1e-3 else _three(value)


def _three(value: float) -> str:
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    text = f"{value:,.{decimals}f}"
    return text if decimals <= 2 or abs(value) < 1 else text.rstrip("0").rstrip(".")


def times(value: float) -> str:
    """A ratio: `1.83×`, `12.4×`, `0.90×`."""
    return f"{value:.2f}×" if value < 9.995 else f"{_three(value)}×"


def spread(r: Ratio) -> str:
    """The quartiles of a ratio: `1.79–1.88`."""
    return f"{times(r.low)[:-1]}–{times(r.high)[:-1]}"


def estimate(e: Estimate | None, metric: Metric | None = None, signed: bool = False) -> str:
    """A value with its interval: `2.193 ± 0.012`, or of a metric in percent `87.3 ± 0.6%`.

    `signed` is for differences: `+0.120 ± 0.011`, and in points `+1.2 ± 0.6 points`.
    """
    if e is None:
        return NOT_MEASURED
    if not math.isfinite(e.value):
        return plain(e.value)
    if metric is not None and metric.percent:
        unit = (" point" if f"{abs(100 * e.value):.1f}" == "1.0" and e.error is None else " points") if signed else "%"
        return _figure(100 * e.value, None if e.error is None else 100 * e.error, 1, signed) + unit
    if abs(e.value) >= 1000:
        return plain(e.value) if e.error is None else f"{plain(e.value)} ± {plain(e.error)}"
    decimals = 4 if e.error is not None and e.error < 0.001 else 1 if abs(e.value) >= 10 else 3
    return _figure(e.value, e.error, decimals, signed)


def _figure(value: float, error: float | None, decimals: int, signed: bool) -> str:
    text = f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:.{decimals}f}"


def printable(text: str) -> str:
    """Text that a model wrote, safe to show: control characters, lone surrogates and bidi overrides become U+FFFD."""
    return "".join("\ufffd" if _unprintable(c) else c for c in text.replace("\r\n", "\n"))


def _unprintable(c: str) -> bool:
    control = unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
    return control or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"


def one_line(text: str) -> str:
    """`printable`, with all white space made single blanks."""
    return " ".join(printable(text).split())
