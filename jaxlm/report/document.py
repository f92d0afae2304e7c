"""The report: which model to ship, with every number and how it was measured.

`write` leaves `report.json` (everything, raw rounds included), `report.md`, `report.html` (one file, no network),
`pareto.png` and `layers.png`. `table` is the short form for the console.
"""

import base64
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.core.strict_json import strict
from jaxlm.evaluate.comparison import Layer, ModelResult, against_reference, by_name
from jaxlm.evaluate.per_example import PerExampleResults
from jaxlm.evaluate.timing import Timing
from jaxlm.report import layer_plot, pareto_plot
from jaxlm.report.formatting import NOT_MEASURED, estimate, one_line, plain, printable, scaled, spread, times
from jaxlm.report.summary import NO_GAIN, badges, described, recommendations, summary

if TYPE_CHECKING:
    from rich.table import Table

PROTOCOL = ("corpus", "tokenizer", "pieces", "intervals", "machine", "versions", "seeds", "timing")
"""What every report says about how it was measured; more may be added."""
PICTURES = ("pareto.png", "layers.png")
CAPTION = (
    "Small print: against the reference. Speed and latency: median over rounds in which all models took turns; in "
    "brackets the quartiles of the ratio within a round, above 1× is faster; of the reference, its own quartiles. "
    "±: two standard errors over the held-out examples (jackknife), for a difference from the reference paired example "
    "by example. Tokens/s, memory and compile time are of a forward pass over a batch."
)
MODELS_HEADING = "Gains, losses and samples"
SIGNS = {1: "▲", 0: "=", -1: "▼", None: ""}
CLASSES = {1: "better", 0: "equal", -1: "worse", None: "equal"}
"""Of the style sheet."""


class Cell(NamedTuple):
    """One entry of the table: the number, how it compares with the reference, and its outcome, better 1 to worse -1."""

    label: str
    value: str
    note: str = ""
    outcome: int | None = None


def write(
    directory: str | Path,
    rows: Sequence[ModelResult],
    protocol: Mapping[str, Any],
    title: str = "Which model to ship",
    tolerance: float = 0.05,
) -> Path:
    """Writes the five files and returns the path of `report.html`.

    Args:
      directory: created if it is missing; files of these names are replaced.
      rows: the models, in the order they are to appear.
      protocol: how everything was measured; the entries named in `PROTOCOL` must be there (ValueError).
      title: heading.
      tolerance: recommended are models whose quality is at most this fraction worse than the reference's.
    """
    by_name(rows)
    if missing := [key for key in PROTOCOL if key not in protocol]:
        raise ValueError(f"a report without its protocol cannot be judged; missing: {', '.join(missing)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, draw in zip(PICTURES, (pareto_plot.draw, layer_plot.draw), strict=True):
        draw(rows, directory / name)
    _save(directory / "report.json", to_json(rows, protocol, title, tolerance))
    _save(directory / "report.md", to_markdown(rows, protocol, title, tolerance))
    page = to_html(rows, protocol, title, tolerance, *(_picture(rows, directory / name) for name in PICTURES))
    _save(directory / "report.html", page)
    return directory / "report.html"


def _save(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def cells(row: ModelResult, rows: Mapping[str, ModelResult]) -> list[Cell]:
    """The numbers of one model, in the order of the table."""
    against = against_reference(row, rows)
    outcomes = {} if against is None else against.outcomes()
    size = speed = latency = flops = ""
    if against is not None:
        size = f"{times(against.size)} smaller" if against.size >= 1 else f"{times(1 / against.size)} larger"
        size = "same size" if outcomes["size"] == 0 else size
        speed = f"{times(against.speed.median)} ({spread(against.speed)})" if against.speed else ""
        latency = f"{times(against.latency.median)} ({spread(against.latency)})" if against.latency else ""
        flops = f"{times(against.flops)} fewer" if against.flops and against.flops > 1.005 else ""
    fast, slow = row.tokens_per_second, row.latency_ms
    if against is None:
        speed = f"{scaled(fast.low)}–{scaled(fast.high)}" if fast else ""
        latency = f"{plain(slow.low)}–{plain(slow.high)} ms" if slow else ""
    return [
        Cell("Parameters", scaled(row.parameters), f"{scaled(row.parameters_non_embedding)} non-embedding"),
        Cell("Size on disk", scaled(row.bytes_on_disk, "B"), size, outcomes.get("size")),
        Cell("FLOPs per token", scaled(row.flops_per_token), flops),
        Cell("Tokens/s in batches", scaled(fast and fast.median), speed, outcomes.get("speed")),
        Cell(
            "Latency at batch 1", f"{plain(slow.median)} ms" if slow else NOT_MEASURED, latency, outcomes.get("latency")
        ),
        *_quality_cells(row, rows, outcomes.get("quality")),
        Cell(
            "Peak memory",
            scaled(row.peak_bytes, "B"),
            "" if row.compile_seconds is None else f"compiled in {plain(row.compile_seconds)} s",
        ),
    ]


def _quality_cells(row: ModelResult, rows: Mapping[str, ModelResult], outcome: int | None) -> list[Cell]:
    """Every metric of the task, the first with its difference from the reference, and the agreement."""
    measured = _measured(rows.values())
    if measured is None:
        return [Cell("Quality", NOT_MEASURED)]
    entries, against = [], against_reference(row, rows)
    for i, metric in enumerate(measured.metrics):
        value = estimate(row.held_out.estimate(metric), metric) if row.held_out else NOT_MEASURED
        change = estimate(against.quality, metric, signed=True) if not i and against and against.quality else ""
        entries.append(Cell(metric.label, value, change, None if i else outcome))
    agreement = measured.spec.agreement
    return [*entries, Cell(agreement.label, estimate(row.held_out.agreement if row.held_out else None, agreement))]


def _measured(rows: Iterable[ModelResult]) -> PerExampleResults | None:
    """The results of the first model whose quality was measured."""
    return next((row.held_out for row in rows if row.held_out is not None), None)


# ---- console


def table(rows: Sequence[ModelResult]) -> "Table":
    """The report in short, for the console; ▲ and ▼: beyond noise better and worse than the reference."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    named, measured = by_name(rows), _measured(rows)
    shown = {
        "Parameters": "Params",
        "Size on disk": "Size",
        "Tokens/s in batches": "Tokens/s",
        "Latency at batch 1": "Latency",
    }
    if measured is not None:
        quality = measured.metrics[0].label
        shown |= {quality: quality, measured.spec.agreement.label: "Agrees"}
    styles = {1: "cyan", 0: "dim", -1: "yellow"}
    result = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, show_edge=False)
    result.add_column("Model", overflow="fold", min_width=10, max_width=24)
    for head in shown.values():
        result.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        line = [Text(one_line(row.name), style="bold")]
        for cell in (c for c in cells(row, named) if c.label in shown):
            text = Text(re.sub(r" ± [\d.,]+", "", cell.value))
            if cell.outcome is not None:
                text.append(f"\n{SIGNS[cell.outcome]} {cell.note.split(' ')[0]}", style=styles[cell.outcome])
            line.append(text)
        result.add_row(*line)
    return result


# ---- report.json


def to_json(rows: Sequence[ModelResult], protocol: Mapping[str, Any], title: str, tolerance: float) -> str:
    """Strict JSON: what is not a number, or not measured, is null."""
    named = by_name(rows)
    content = {
        "title": title,
        "verdict": summary(rows, tolerance),
        "tolerance": tolerance,
        "picks": [choice._asdict() for choice in recommendations(rows, tolerance)],
        "models": [_model(row, named) for row in rows],
        "protocol": protocol,
    }
    return json.dumps(strict(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: str | Path) -> list[ModelResult]:
    """The rows of a `report.json`, with every raw measurement: the inverse of `write`."""
    fields = {field.name for field in dataclasses.fields(ModelResult)}
    rows = []
    for model in json.loads(Path(path).read_text(encoding="utf-8"))["models"]:
        timing, held_out = model["measurements"]["timing"], model["measurements"]["held_out"]
        kept = {name: value for name, value in model.items() if name in fields and name not in timing}
        kept |= {"beside": tuple(model["beside"]), "layers": tuple(Layer(**layer) for layer in model["layers"])}
        rows.append(
            ModelResult(
                **kept | {"batch_tokens": timing["batch_tokens"]},
                batch=_timing(timing["batch"]),
                single=_timing(timing["single"]),
                held_out=None if held_out is None else _held_out(held_out),
            )
        )
    return rows


def _timing(stored: Mapping[str, Any] | None) -> Timing | None:
    return None if stored is None else Timing(tuple(stored["seconds"]))


def _held_out(stored: Mapping[str, Any]) -> PerExampleResults:
    """What was not a number was stored as null."""
    columns = {n: tuple(math.nan if v is None else v for v in column) for n, column in stored["columns"].items()}
    return PerExampleResults(stored["task"], columns, stored["classes"])


def _model(row: ModelResult, rows: Mapping[str, ModelResult]) -> dict[str, Any]:
    against = against_reference(row, rows)
    raw = asdict(row)
    timing = {"batch": raw.pop("batch"), "single": raw.pop("single"), "batch_tokens": raw.pop("batch_tokens")}
    held_out = raw.pop("held_out")
    metrics = row.held_out.metrics if row.held_out else ()
    return raw | {
        "layers": row.layers,
        "tokens_per_second": row.tokens_per_second,
        "latency_ms": row.latency_ms,
        "quality": {metric.name: row.held_out.estimate(metric) for metric in metrics if row.held_out},
        "agreement": row.held_out.agreement if row.held_out else None,
        "against_reference": None if against is None else against._asdict() | {"outcomes": against.outcomes()},
        "summary": described(row, rows),
        "measurements": {"timing": timing, "held_out": held_out},
    }


# ---- report.md


def to_markdown(rows: Sequence[ModelResult], protocol: Mapping[str, Any], title: str, tolerance: float) -> str:
    """GitHub's Markdown."""
    named = by_name(rows)
    labels = [cell.label for cell in cells(rows[0], named)]
    lines = [
        f"# {_md(title)}",
        "",
        _md(summary(rows, tolerance)),
        "",
        "![Quality, size and speed](pareto.png)",
        "",
    ]
    lines += ["![What is left of every layer](layers.png)", ""] if layer_plot.shown(rows) else []
    lines += ["| Model | " + " | ".join(labels) + " |", "| :-- |" + " --: |" * len(labels)]
    for row in rows:
        entries = [_md(c.value) + (f"<br><sub>{_md(c.note)}</sub>" if c.note else "") for c in cells(row, named)]
        lines.append(f"| **{_md(row.name)}**<br><sub>{_md(row.description)}</sub> | " + " | ".join(entries) + " |")
    lines += ["", f"<sub>{_md(CAPTION)}</sub>", "", f"## {MODELS_HEADING}"]
    for row in rows:
        lines += ["", f"### {_md(row.name)}", ""]
        lines += [f"- {_md(text)}" for text in [*described(row, named), *_stored(row)]]
        if row.sample is not None:
            text = printable(row.prompt + row.sample)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            lines += ["", _md(_sample_heading(row)), "", f"{fence}text", text, fence]
    lines += ["", "## Protocol", "", *(f"- **{_md(key)}**: {_md(_readable(value))}" for key, value in protocol.items())]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", one_line(text))


def _stored(row: ModelResult) -> list[str]:
    parts = [f"{scaled(size, 'B')} {dtype}" for dtype, size in row.bytes_by_dtype.items()]
    facts = [f"{name}: {fact}." for name, fact in row.facts.items()]
    facts += [f"Trained on {scaled(row.train_tokens)} tokens."] if row.train_tokens else []
    return [*([f"Stored as {', '.join(parts)}."] if parts else []), *facts]


def _sample_heading(row: ModelResult) -> str:
    speed = row.sample_tokens_per_second
    text = f"What it wrote, continuing {one_line(row.prompt)!r}" if row.prompt else "What it wrote"
    return f"{text}{'' if speed is None else f', at {plain(speed)} tokens per second'}:"


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_readable(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_readable(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---- report.html


def to_html(
    rows: Sequence[ModelResult], protocol: Mapping[str, Any], title: str, tolerance: float, pareto: str, layers: str
) -> str:
    """One file: style inside, no script, light and dark, for screens of any width and for paper.

    `pareto` and `layers` are the only things that are not escaped: elements that show the Pareto fronts, and what is
    left of the layers ("" for none).
    """
    named = by_name(rows)
    labels = [cell.label for cell in cells(rows[0], named)]
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    chosen = "".join(
        f'<div class="recommendation"><dt>{_html(choice.wish)}</dt><dd class="name">{_html(choice.name)}</dd>'
        f'<dd class="faint">{_html(choice.numbers)}</dd></div>'
        for choice in recommendations(rows, tolerance)
    )
    return template.substitute(
        title=_html(title),
        summary=_html(summary(rows, tolerance)),
        recommendations=f'<dl class="recommendations">{chosen}</dl>' if chosen and len(rows) > 1 else "",
        pareto=pareto,
        layers=f"<h2>What is left of every layer</h2><figure>{layers}</figure>" if layers else "",
        heading=MODELS_HEADING,
        caption=_html(CAPTION),
        head='<th scope="col">Model</th>' + "".join(f'<th scope="col">{_html(label)}</th>' for label in labels),
        body="\n".join(_html_row(row, named) for row in rows),
        models="\n".join(_html_model(row, named) for row in rows),
        protocol="\n".join(
            f"<dt>{_html(key)}</dt><dd>{_html(_readable(value))}</dd>" for key, value in protocol.items()
        ),
    )


def _html(text: str) -> str:
    return escape(one_line(text))


def _html_row(row: ModelResult, rows: Mapping[str, ModelResult]) -> str:
    entries = []
    for c in cells(row, rows):
        sign = f"{SIGNS[c.outcome]} " if c.outcome is not None else ""
        note = f'<small class="{CLASSES[c.outcome]}">{sign}{_html(c.note)}</small>' if c.note else ""
        entries.append(f'<td data-label="{_html(c.label)}">{_html(c.value)}{note}</td>')
    head = f"{_html(row.name)}<small>{_html(row.description)}</small>"
    return f'<tr><th scope="row">{head}</th>{"".join(entries)}</tr>'


def _html_model(row: ModelResult, rows: Mapping[str, ModelResult]) -> str:
    marks = "".join(
        f'<span class="badge {CLASSES[badge.outcome]}">{SIGNS[badge.outcome]} {_html(badge.phrase)}</span>'
        for badge in badges(row, rows)
    )
    lines = "".join(
        f"<p{' class=negative' * text.startswith(NO_GAIN)}>{_html(text)}</p>"
        for text in [*described(row, rows), *_stored(row)]
    )
    sample = ""
    if row.sample is not None:
        prompt, written = escape(printable(row.prompt)), escape(printable(row.sample))
        above = f'<p class="faint">{_html(_sample_heading(row))}</p>'
        sample = f'{above}<pre dir="auto"><span class="prompt">{prompt}</span>{written}</pre>'
    head = f'<h3>{_html(row.name)}</h3><p class="faint">{_html(row.description)}</p>'
    return f"<article><div>{head}<div>{marks}</div>{lines}</div><div>{sample}</div></article>"


ALT = {
    "pareto.png": "Quality against size on disk and against tokens per second; the numbers are in the table below.",
    "layers.png": "Heads, FFN units, width, zeros and bits of every layer and model; the numbers are in report.json.",
}


def _picture(rows: Sequence[ModelResult], wide: Path) -> str:
    """A `<picture>` holding four images: wide and narrow, light and dark; paper gets the wide light one."""
    if wide.name == "layers.png" and not layer_plot.shown(rows):
        return ""
    draw = pareto_plot.draw if wide.name == "pareto.png" else layer_plot.draw
    narrow, dark = "(max-width: 46rem)", "(prefers-color-scheme: dark)"
    tags = []
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "picture.png"
        for media, is_dark, is_narrow in (
            (f"{narrow} and {dark}", True, True),
            (narrow, False, True),
            (dark, True, False),
        ):
            draw(rows, file, dark=is_dark, stacked=is_narrow)
            tags.append(f'<source media="screen and {media}" srcset="{_data(file)}">')
    return f'<picture>{"".join(tags)}<img alt="{ALT[wide.name]}" src="{_data(wide)}"></picture>'


def _data(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
