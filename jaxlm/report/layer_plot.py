"""The picture of what is left: heads, FFN units, width, zeros and bits of every layer of every model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.evaluate.comparison import Layer, ModelResult
from jaxlm.report.formatting import one_line
from jaxlm.report.pareto_plot import DARK, LIGHT, Theme

LONGEST_NAME = 18
MOST_NUMBERED = 12
"""More layers than that are too narrow for a number in each."""


class Panel(NamedTuple):
    """One quantity: its title, how it is read off a layer and how it is written in a cell."""

    title: str
    value: Callable[[Layer], float]
    written: Callable[[float], str]


GROUPS = "KV groups"
PANELS = (
    Panel("Heads", lambda layer: layer.heads, lambda v: f"{v:.0f}"),
    Panel(GROUPS, lambda layer: layer.groups, lambda v: f"{v:.0f}"),
    Panel("FFN units", lambda layer: layer.ffn, lambda v: f"{v:.0f}"),
    Panel("Width of the stream", lambda layer: layer.width, lambda v: f"{v:.0f}"),
    Panel("Entries that are not zero", lambda layer: 100 * (1 - layer.zeros), lambda v: f"{v:.0f}%"),
    Panel("Bits on disk per entry", lambda layer: layer.bits, lambda v: f"{v:.1f}".removesuffix(".0")),
)


def shown(rows: Sequence[ModelResult]) -> list[Panel]:
    """The panels in which some layer differs from another, or models in their number of layers.

    Where no two heads share a group, groups are heads and have no panel of their own.
    """
    known = [row.layers for row in rows if row.layers]
    depths = {len(layers) for layers in known}
    shared = any(layer.groups != layer.heads for layers in known for layer in layers)
    different = []
    for panel in PANELS:
        if panel.title == GROUPS and not shared:
            continue
        values = np.array([panel.value(layer) for layers in known for layer in layers])
        if len(values) and np.ptp(values) > 0.01 * np.abs(values).max():
            different.append(panel)
    return different or (list(PANELS[:1]) if len(depths) > 1 else [])


def draw(rows: Sequence[ModelResult], path: str | Path, *, dark: bool = False, stacked: bool = False) -> None:
    """Draws one panel a quantity into a PNG: a row a model, a column a layer, darker where more is left.

    Args:
      rows: the models; those whose layers are not known are left out.
      path: file to write; nothing is written where there is nothing to tell apart.
      dark: for a dark page.
      stacked: panels above each other, for a narrow page.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    panels, known = shown(rows), [row for row in rows if row.layers]
    if not panels:
        return
    theme, names = DARK if dark else LIGHT, max((row.layers for row in known), key=len)
    columns = 1 if stacked else 2
    lines = -(-len(panels) // columns)
    high = 0.9 + 0.27 * len(known)
    width = 4.2 if stacked else 11.0
    figure = Figure(figsize=(width, lines * high), dpi=180, facecolor=theme.paper, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, panel, known, [layer.name for layer in names], theme)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def _panel(axes: Any, panel: Panel, rows: Sequence[ModelResult], names: list[str], theme: Theme) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    table = np.full((len(rows), len(names)), np.nan)
    for i, row in enumerate(rows):
        at = {layer.name: panel.value(layer) for layer in row.layers}
        table[i] = [at.get(name, np.nan) for name in names]
    colors = LinearSegmentedColormap.from_list("left", [theme.dominated, "#56B4E9", "#0072B2"])
    shares = table / (np.nanmax(table) or 1.0)
    axes.imshow(shares, cmap=colors, vmin=0, vmax=1, aspect="auto")
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=11, fontweight="bold", pad=6)
    axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows], color=theme.ink, fontsize=8.5)
    every = max(1, -(-len(names) // MOST_NUMBERED))
    axes.set_xticks(range(0, len(names), every), names[::every], color=theme.faint, fontsize=8)
    axes.set_xlabel("layer", color=theme.faint, fontsize=8.5)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=theme.paper, linewidth=2)
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_visible(False)
    axes.set_facecolor(theme.paper)
    if len(names) > MOST_NUMBERED:
        return
    for (i, j), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        light = np.dot(colors(shares[i, j])[:3], (0.299, 0.587, 0.114)) > 0.55
        ink = "#1b1f24" if light else "#ffffff"
        axes.text(j, i, panel.written(value), ha="center", va="center", fontsize=8, color=ink)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
