"""The picture: quality against size on disk and against measured speed, with the Pareto front."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from jaxlm.evaluate.comparison import Comparison, ModelResult, against_reference, by_name
from jaxlm.report.formatting import one_line, scaled, times
from jaxlm.report.label_placement import Box, arrange, candidates, nearest
from jaxlm.tasks import Metric

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito (2008): told apart with every kind of colour vision. Shapes differ as well."""
MARKERS = "osD^vPX"
LONGEST_NAME = 26
MOST_NAMED = 14
"""More models than that leave no room for the name of each."""


class Theme(NamedTuple):
    """Colours of everything but the models."""

    paper: str
    ink: str
    faint: str
    grid: str
    dominated: str


LIGHT = Theme(paper="#ffffff", ink="#1b1f24", faint="#5d6671", grid="#e3e6ea", dominated="#f3f5f7")
DARK = Theme(paper="#14171b", ink="#e8eaed", faint="#9aa3ad", grid="#2b3138", dominated="#1b1f25")


class Point(NamedTuple):
    """One model in one panel: `x` with its quartiles, `y` with its half-interval, label, colour and shape.

    The interval is that of the difference from the reference: all models read the same text, so the much larger error
    of each value alone says nothing about which is better. The reference has none.
    """

    x: float
    low: float
    high: float
    y: float
    error: float
    name: str
    note: str
    color: str
    marker: str


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, by the first coordinate; both are costs, ties are kept.

    >>> front([(1.0, 3.0), (2.0, 2.0), (2.0, 4.0), (3.0, 1.0), (float("nan"), 0.0)])
    [0, 1, 3]
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]

    def dominated(i: int) -> bool:
        x, y = points[i]
        return any(a <= x and b <= y and (a < x or b < y) for a, b in (points[j] for j in finite))

    return sorted((i for i in finite if not dominated(i)), key=lambda i: points[i])


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The point of a front where more of one cost begins to buy little of the other, `None` for fewer than three.

    Both costs are scaled to [0, 1] between the ends of the front; the knee is furthest below the straight line between
    the ends (Das 1999; Kneedle, Satopää et al. 2011).

    Args:
      points: the front, by the first cost.

    >>> knee([(1.0, 9.0), (2.0, 4.0), (5.0, 3.0), (9.0, 2.5)])
    1
    """
    if len(points) < 3:
        return None
    x, y = (np.asarray(costs, np.float64) for costs in zip(*points, strict=True))
    if x[0] == x[-1] or y[0] == y[-1]:
        return None
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    return int(below.argmax()) if below.max() > 0 else None


def draw(rows: Sequence[ModelResult], path: str | Path, *, dark: bool = False, stacked: bool = False) -> None:
    """Draws both panels into a PNG. Models without a finite quality are named below them instead.

    Args:
      rows: the models.
      path: file to write.
      dark: for a dark page.
      stacked: one panel above the other, for a narrow page.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from PIL import Image

    theme = DARK if dark else LIGHT
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05, hspace=0.04)
    figure = Figure(figsize=(4.2, 7.8) if stacked else (11.0, 4.9), dpi=180, facecolor=theme.paper, layout=layout)
    canvas = FigureCanvasAgg(figure)
    size_axes, speed_axes = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    sizes, speeds, absent = _points(rows, brief=stacked)
    metric, references = _metric(rows), {_short(row.name) for row in rows if row.reference is None}
    size_front = _panel(size_axes, sizes, theme, metric, smaller_is_better=True)
    speed_front = _panel(speed_axes, speeds, theme, metric, smaller_is_better=False)
    ringed = any(axes.findobj(lambda artist: artist.get_gid() == "knee") for axes in (size_axes, speed_axes))
    figure.supxlabel(
        fill(_legend(absent, ringed, len(sizes) > MOST_NAMED), 64 if stacked else 195),
        fontsize=7.5 if stacked else 8,
        color=theme.faint,
        parse_math=False,
    )
    figure.draw_without_rendering()  # settles the layout: labels are placed in pixels
    figure.set_layout_engine("none")
    _label(size_axes, sizes, _named(sizes, size_front, references), theme)
    _label(speed_axes, speeds, _named(speeds, speed_front, references), theme)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def _named(points: Sequence[Point], on_front: Sequence[int], references: set[str]) -> list[int]:
    """The points that have room for a label: all of few, of many those on the front and what they are compared with."""
    few = len(points) <= MOST_NAMED
    return [i for i, point in enumerate(points) if few or i in on_front or point.name in references]


def _legend(absent: Sequence[str], ringed: bool, many: bool) -> str:
    return (
        "Filled: on the Pareto front. Hollow: another model is at least as good on both axes. "
        + ("Ring: the knee of the front, beyond which giving up quality saves little. " if ringed else "")
        + "Bars: difference from the reference ± 2 standard errors; middle half of the timed rounds. "
        + ("Named: the front, and what the others are compared with; all numbers are in the table. " if many else "")
    ) + (f"Not drawn, without quality: {', '.join(absent)}." if absent else "")


def _points(rows: Sequence[ModelResult], brief: bool) -> tuple[list[Point], list[Point], list[str]]:
    """Points of the size panel, of the speed panel, and the names of models that cannot be placed."""
    named = by_name(rows)
    sizes, speeds, absent = [], [], []
    metric = _metric(rows)
    scale = 100 if metric and metric.percent else 1
    for i, row in enumerate(rows):
        name, quality = _short(row.name), row.quality
        if quality is None or not math.isfinite(quality.value):
            absent.append(name)
            continue
        against = against_reference(row, named)
        error = (against.quality.error if against and against.quality else None) or 0.0
        look = (name, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        size, speed = row.bytes_on_disk, row.tokens_per_second
        sizes.append(
            _point(
                (size, size, size),
                scale * quality.value,
                scale * error,
                scaled(size, "B") + ("" if brief else _smaller(against)),
                look,
            )
        )
        if speed is not None:
            speeds.append(
                _point(
                    speed,
                    scale * quality.value,
                    scale * error,
                    f"{scaled(speed.median)}/s" + ("" if brief else _as_fast(against)),
                    look,
                )
            )
    return sizes, speeds, absent


def _metric(rows: Sequence[ModelResult]) -> Metric | None:
    """What quality is measured in, `None` where it was not."""
    return next((row.metric for row in rows if row.metric is not None), None)


def _point(x: tuple[float, float, float], y: float, error: float, note: str, look: tuple[str, str, str]) -> Point:
    return Point(*x, y, error, look[0], note, look[1], look[2])


def _smaller(against: Comparison | None) -> str:
    return f", {times(against.size)} smaller" if against and against.size > 1.005 else ""


def _as_fast(against: Comparison | None) -> str:
    return f", {times(against.speed.median)} as fast" if against and against.speed else ""


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _panel(
    axes: Any, points: Sequence[Point], theme: Theme, metric: Metric | None, smaller_is_better: bool
) -> list[int]:
    """Draws axes, front and points; returns the points on the front."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    what, unit = ("size on disk", "B") if smaller_is_better else ("tokens per second, measured", "")
    title = "Quality against size" if smaller_is_better else "Quality against speed"
    axes.set_title(title, loc="left", color=theme.ink, fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel(what, fontsize=9.5, color=theme.faint)
    axes.set_ylabel(_what(metric), fontsize=9.5, color=theme.faint)
    axes.set_facecolor(theme.paper)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.grid)
    axes.tick_params(colors=theme.faint, labelsize=9, length=0, which="both")
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    if not points:
        axes.set(xticks=[], yticks=[])
        missing = "no quality was measured" if smaller_is_better else "speed and quality were not both measured"
        axes.text(0.5, 0.5, missing, transform=axes.transAxes, ha="center", color=theme.faint, fontsize=10)
        return []
    _limits(axes, points)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.0+(?=\D|$)", "", scaled(x, unit))))
    on_front, bend = _draw_front(axes, points, theme, smaller_is_better, metric is not None and metric.higher)
    crowd = len(points) > MOST_NAMED
    for i, p in enumerate(points):
        axes.errorbar(p.x, p.y, yerr=p.error, xerr=[[p.x - p.low], [p.high - p.x]], color=p.color, lw=1.4)
        face, size = (p.color, 9) if i in on_front else (theme.paper, 5 if crowd else 9)
        axes.plot(p.x, p.y, p.marker, ms=size, mfc=face, mec=p.color, mew=1.8, zorder=5 if i in on_front else 4)
        if i == bend:
            axes.plot(p.x, p.y, "o", ms=17, mfc="none", mec=theme.ink, mew=1.2, zorder=3, gid="knee")
    return on_front


def _what(metric: Metric | None) -> str:
    if metric is None:
        return "quality on held-out data"
    data = "text" if "text" in metric.comparatives[0] else "data"
    return f"{metric.unit}{' in %' * metric.percent} on held-out {data}"


def _limits(axes: Any, points: Sequence[Point]) -> None:
    """Room around the points for their labels; a logarithmic axis where sizes differ by more than three times."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = min(p.low for p in points), max(p.high for p in points)
    if high > 3 * low:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        room = (high / low) ** 0.22
        axes.set_xlim(low / room, high * room)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        room = 0.22 * (high - low) or 0.2 * high
        axes.set_xlim(low - room, high + room)
    bottom, top = min(p.y - p.error for p in points), max(p.y + p.error for p in points)
    room = 0.18 * (top - bottom) or 0.1
    axes.set_ylim(bottom - room, top + room)


def _draw_front(
    axes: Any, points: Sequence[Point], theme: Theme, smaller_is_better: bool, higher: bool
) -> tuple[list[int], int | None]:
    """The staircase of what is reachable; the shaded side is dominated by a model on it.

    Returns:
      the points on it, and the one at its knee.
    """
    right, up = (1 if smaller_is_better else -1), (-1 if higher else 1)
    costs = [(right * p.x, up * p.y) for p in points]
    best = front(costs)
    worst_x, worst_y = axes.get_xlim()[1 if smaller_is_better else 0], axes.get_ylim()[0 if higher else 1]
    corners = [(points[best[0]].x, worst_y)]
    for current, following in zip(best, [*best[1:], None], strict=True):
        corners.append((points[current].x, points[current].y))
        corners.append((worst_x if following is None else points[following].x, points[current].y))
    shaded = [*corners, (worst_x, worst_y)]
    axes.fill(*zip(*shaded, strict=True), color=theme.dominated, zorder=0, lw=0)
    axes.plot(*zip(*corners, strict=True), color=theme.faint, linewidth=1.3, zorder=2, gid="front")
    at, side = (0.012, "left") if smaller_is_better else (0.988, "right")
    arrow = {(True, False): "↙ better", (False, False): "better ↘", (True, True): "↖ better", (False, True): "better ↗"}
    height, edge = (0.98, "top") if higher else (0.02, "bottom")
    axes.text(
        at,
        height,
        arrow[smaller_is_better, higher],
        transform=axes.transAxes,
        ha=side,
        va=edge,
        fontsize=9.5,
        color=theme.faint,
        gid="obstacle",
    )
    bend = knee([costs[i] for i in best])
    return best, None if bend is None else best[bend]


def _label(axes: Any, points: Sequence[Point], named: Sequence[int], theme: Theme) -> None:
    """Writes name and numbers beside those points, where they cover the least; from afar with a line to the point."""
    renderer, dot = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    all_centres = [tuple(axes.transData.transform((p.x, p.y))) for p in points]
    centres = [all_centres[i] for i in named]
    plain = {"transform": None, "zorder": 6, "parse_math": False}
    texts, options = [], []
    for p, (x, y) in zip((points[i] for i in named), centres, strict=True):
        name = axes.text(0, 0, p.name, fontsize=9.5, fontweight="bold", color=theme.ink, **plain)
        note = axes.text(0, 0, p.note, fontsize=8, color=theme.faint, **plain)
        width = max(text.get_window_extent(renderer).width for text in (name, note))
        texts.append((name, note))
        options.append(candidates((x, y), [c for c in all_centres if c != (x, y)], width, dot))
    chosen = arrange(options, _obstacles(axes, points), tuple(axes.get_window_extent(renderer).extents), dot)
    for (name, note), (x, y), (_, box) in zip(texts, centres, chosen, strict=True):
        side = "left" if box[0] > x else "right" if box[2] < x else "center"
        at = {"left": box[0], "right": box[2], "center": (box[0] + box[2]) / 2}[side]
        name.set(position=(at, box[1] + 12 * dot), ha=side)
        note.set(position=(at, box[1] + 2 * dot), ha=side)
        end = nearest(box, (x, y))
        if math.dist((x, y), end) > 16 * dot:
            axes.plot(*zip((x, y), end, strict=True), color=theme.faint, lw=0.7, transform=None, zorder=3)


def _obstacles(axes: Any, points: Sequence[Point]) -> list[Box]:
    """What labels should not cover: points, bars, the front, the hint."""
    dot = axes.figure.dpi / 72
    boxes: list[Box] = []
    for p in points:
        x, y = axes.transData.transform((p.x, p.y))
        boxes.append((x - 7 * dot, y - 7 * dot, x + 7 * dot, y + 7 * dot))
        (left, low), (right, high) = axes.transData.transform([(p.low, p.y - p.error), (p.high, p.y + p.error)])
        boxes += [(left, y - dot, right, y + dot), (x - dot, low, x + dot, high)]
    for line in (line for line in axes.lines if line.get_gid() == "front"):
        corners = axes.transData.transform(line.get_xydata())
        for (x0, y0), (x1, y1) in pairwise(corners):
            boxes.append((min(x0, x1) - dot, min(y0, y1) - dot, max(x0, x1) + dot, max(y0, y1) + dot))
    hints = (text for text in axes.texts if text.get_gid() == "obstacle")
    return boxes + [tuple(text.get_window_extent().extents) for text in hints]
