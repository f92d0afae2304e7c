"""Acceptance criteria: what was asked of compression, what was measured, and whether that is enough."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxlm.core import lookup
from jaxlm.evaluate.comparison import ModelResult, by_name, compare
from jaxlm.evaluate.per_example import Estimate, PerExampleResults, combine
from jaxlm.evaluate.timing import Ratio
from jaxlm.report.formatting import spread, times

Value = Estimate | Ratio | float


class Criterion(NamedTuple):
    """One line of a table: what, how much, the target, and whether it was passed; `None` where it cannot be said."""

    what: str
    measured: str
    target: str
    passed: bool | None


def at_least(what: str, value: Value, bar: float, unit: str = "") -> Criterion:
    """A criterion that a value is large enough.

    >>> at_least("agreement", Estimate(0.994, 0.003), 0.99, "%")
    Criterion(what='agreement', measured='99.4 ± 0.3%', target='≥ 99%', passed=True)
    """
    return Criterion(what, written(value, unit), f"≥ {_bar(bar, unit)}", _middle(value) >= bar)


def at_most(what: str, value: Value, bar: float, unit: str = "") -> Criterion:
    """A criterion that a value is small enough."""
    return Criterion(what, written(value, unit), f"≤ {_bar(bar, unit)}", _middle(value) <= bar)


def positive(what: str, value: Estimate, unit: str = "") -> Criterion:
    """A criterion that a difference lies above zero with its whole interval."""
    return Criterion(what, written(value, unit), "interval above 0", value.value > (value.error or 0.0))


def written(value: Value, unit: str) -> str:
    """A value with its interval; `%` shows fractions in percent, `points` differences of such, `×` ratios."""
    if isinstance(value, Ratio):
        return f"{times(value.median)} ({spread(value)})"
    number, error = value if isinstance(value, Estimate) else (value, None)
    if unit == "×":
        return times(number)
    scale, decimals, end = (100, 1, "%" if unit == "%" else " points") if unit in ("%", "points") else (1, 3, "")
    text = f"{scale * number:{'+' if unit == 'points' else ''}.{decimals}f}".replace("-", "−")
    return f"{text}{'' if error is None else f' ± {scale * error:.{decimals}f}'}{end}"


def _bar(bar: float, unit: str) -> str:
    return f"{100 * bar:g}{'%' if unit == '%' else ' points'}" if unit in ("%", "points") else f"{bar:g}{unit}"


def _middle(value: Value) -> float:
    if isinstance(value, float | int):
        return float(value)
    return value.median if isinstance(value, Ratio) else value.value


class Results:
    """The models of a report by name, and what one may ask of them."""

    def __init__(self, rows: Sequence[ModelResult]):
        self.rows = by_name(rows)

    def row(self, name: str) -> ModelResult:
        return lookup(self.rows, name, "model in the report:")

    def held_out(self, name: str) -> PerExampleResults:
        results = self.row(name).held_out
        if results is None:
            raise ValueError(f"the quality of {name} was not measured")
        return results

    def agreement(self, name: str) -> Estimate:
        """How far its predictions are the first model's."""
        agreement = self.held_out(name).agreement
        if agreement is None:
            raise ValueError(f"{name} was not compared with the first model's predictions")
        return agreement

    def share(self, name: str, of: str) -> Estimate:
        """Its quality divided by another's."""
        return combine(lambda a, b: a / b, self.held_out(name), self.held_out(of))

    def gain(self, name: str, over: str) -> Estimate:
        """How much better its quality is than another's; above 0 is better, whichever way the metric runs."""
        sign = 1 if self.held_out(name).metrics[0].higher else -1
        return combine(lambda a, b: sign * (a - b), self.held_out(name), self.held_out(over))

    def rise(self, name: str, over: str, metric: str) -> Estimate:
        """How much larger one of its metrics is than another model's, as a fraction of that."""
        by_metric = {compared.name: compared for compared in self.held_out(name).metrics}
        chosen = lookup(by_metric, metric, "metric")
        return combine(lambda a, b: a / b - 1, self.held_out(name), self.held_out(over), metric=chosen)

    def recovered(self, name: str, control: str, of: str) -> Estimate:
        """`(q - q_control) / (q_of - q_control)`: how much of the control's drop is recovered."""
        results = map(self.held_out, (name, control, of))
        return combine(lambda q, q_control, q_of: (q - q_control) / (q_of - q_control), *results)

    def recovers(self, what: str, name: str, control: str, of: str, bar: float) -> Criterion:
        """A criterion that enough of the control's drop is recovered.

        Where the control's interval reaches what it is compared with, no loss is shown, and no share of it can be.
        """
        without, with_it = self.gain(control, of), self.gain(name, of)
        if without.value + (without.error or 0.0) < 0:
            return at_least(what, self.recovered(name, control, of), bar, "%")
        measured = f"no loss shown: {written(without, 'points')} without, {written(with_it, 'points')} with"
        return Criterion(what, measured, f"≥ {_bar(bar, '%')}", None)

    def speed(self, name: str, over: str) -> Ratio:
        """Times as fast in batches."""
        speed = compare(self.row(name), self.row(over)).speed
        if speed is None:
            raise ValueError(f"{name} and {over} were not timed")
        return speed

    def bytes(self, name: str, of: str) -> float:
        """Its size on disk, as a fraction of another's."""
        return self.row(name).bytes_on_disk / self.row(of).bytes_on_disk

    def parameters(self, name: str, of: str, embeddings: bool = False) -> float:
        """Its parameters as a fraction of another's, without embeddings unless asked for."""
        counts = [(row.parameters if embeddings else row.parameters_non_embedding) for row in map(self.row, (name, of))]
        return counts[0] / counts[1]
