"""Figures of several panels in the style of the run reports; a plot takes arrays and an axis."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffmbrl.render import palette
from diffmbrl.render.palette import INK, MUTED, PAPER
from diffmbrl.report import figures
from diffmbrl.report.figures import Series, Style

WIDTH, HEIGHT = 2.75, 2.35  # inches of a panel
LEFT, BOTTOM, TOP, HEAD = 0.72, 0.62, 0.36, 0.30  # around it, and above all


def sheet(rows: int, rooms: Sequence[float]) -> tuple[Any, np.ndarray]:
    """A figure of `rows` times as many columns as `rooms`, which says how many inches are left right of each for names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = sum(LEFT + WIDTH + room for room in rooms)
    height = rows * (BOTTOM + HEIGHT + TOP) + HEAD
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = np.empty((rows, len(rooms)), object)
    for i in range(rows):
        x = 0.0
        for j, room in enumerate(rooms):
            y = height - HEAD - (i + 1) * (BOTTOM + HEIGHT + TOP) + BOTTOM
            axes[i, j] = figure.add_axes(((x + LEFT) / width, y / height, WIDTH / width, HEIGHT / height))
            palette.dress(axes[i, j])
            x += LEFT + WIDTH + room
    return figure, axes


def title(axis: Any, text: str) -> None:
    """What a panel shows, above it on the left."""
    axis.set_title(text, loc="left", fontsize=9.5, color=INK, pad=7)


def heading(figure: Any, text: str) -> None:
    """One line above all."""
    inch = 1 / figure.get_size_inches()
    figure.text(0.12 * inch[0], 1 - 0.1 * inch[1], text, fontsize=11, fontweight="bold", color=INK, va="top")


def band(axis: Any, style: Style, x: Any, values: Any, *, dashed: bool = False, thin: bool = False) -> Series:
    """The median over seeds (the last axis) and the range from the lowest to the highest; returns the median."""
    x, values = np.asarray(x, float), np.where(np.isfinite(values), values, np.nan)
    seen = np.isfinite(values).any(axis=-1)
    x, values = x[seen], values[seen]
    middle = np.nanmedian(values, axis=-1)
    low, high = np.nanmin(values, axis=-1), np.nanmax(values, axis=-1)
    axis.fill_between(x, low, high, color=style.colour, alpha=0.13, linewidth=0)
    looks: dict[str, Any] = {"marker": style.marker, "markersize": 3.5} if x.size < 12 else {}
    if dashed:
        looks |= {"linestyle": "--", "markerfacecolor": PAPER}
    axis.plot(x, middle, color=style.colour, linewidth=1.0 if thin else 1.7, **looks)
    return Series(style, x, middle)


def log_limits(axis: Any, side: str, values: Sequence[Any], *, floor: float = 0.0) -> None:
    """A logarithmic axis around all positive finite values of at least `floor`."""
    flat = np.concatenate([np.ravel(np.asarray(y, float)) for y in values]) if len(values) else np.array([])
    flat = flat[np.isfinite(flat) & (flat > floor)]
    if flat.size:
        low, high = float(flat.min()), float(flat.max())
        if high < 1.5 * low:
            low, high = low / 1.5, high * 1.5
        figures.log_axis({"x": axis.xaxis, "y": axis.yaxis}[side], (low, high))


def note(axis: Any, text: str, x: float, y: float, **looks: Any) -> None:
    """Words inside a panel, in fractions of it."""
    axis.text(x, y, text, transform=axis.transAxes, **({"fontsize": 8, "color": MUTED} | looks))
