"""Plots: functions of arrays and an axis. No quoted number is computed here.

Colours are Okabe and Ito's, which people with any colour vision can distinguish; each method also has a marker and its name
at the end of its curve. matplotlib is imported on first use, since a run without figures does not need it.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffmbrl.render.palette import INK, MUTED, PALETTE, PAPER, blank, dress

if TYPE_CHECKING:
    import matplotlib.axes

MINUS = "\u2212"  # unlike a hyphen, as wide as a plus
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
SIZE = (6.0, 3.9)  # inches
RIGHT = 0.76  # where the axis ends and the names begin
Array = np.ndarray


class Style(NamedTuple):
    """Name, colour and marker of a method, the same in every figure."""

    label: str
    colour: str
    marker: str


class Curve(NamedTuple):
    """Returns of one method against a measure of effort: interquartile means, and the interval of the held-out return."""

    style: Style
    x: Array
    train: Array
    test: Array
    low: Array
    high: Array
    stages: Array  # indices at which the objective changed


class Series(NamedTuple):
    """One method's values along an index."""

    style: Style
    x: Array
    y: Array


class RatePoint(NamedTuple):
    """Final returns at one learning rate."""

    x: float
    train: float
    test: float
    low: float
    high: float
    best: bool


def style_of(label: str, *, index: int) -> Style:
    """Return the style of the `index`-th method of a run."""
    return Style(label, PALETTE[index % len(PALETTE)], MARKERS[(index + index // len(PALETTE)) % len(MARKERS)])


def canvas() -> tuple[Any, Any]:
    """Return a figure and its one axis."""
    figure = blank(SIZE)
    axis = figure.add_axes((0.135, 0.14, RIGHT - 0.135, 0.81))
    dress(axis)
    return figure, axis


def settings(salt: str) -> Any:
    """Return matplotlib's settings for every figure.

    The salt makes the ids in the SVG, and so its bytes, reproducible; text is saved as text, searchable and small.
    """
    found = {"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    return found | {"text.color": INK, "axes.labelcolor": INK}


def plot_returns(axis: "matplotlib.axes.Axes", curves: list[Curve], *, xlabel: str) -> None:
    """Plot held-out return, thick with its band, and training return, thin, against a measure of effort."""
    sign = return_axis(axis, [y for curve in curves for y in (curve.train, curve.test)])
    effort_axis(axis, [curve.x for curve in curves], xlabel)
    ends = []
    for curve in curves:
        colour, x = curve.style.colour, curve.x
        low, high, test, train = (_finite(sign * y) for y in (curve.low, curve.high, curve.test, curve.train))
        axis.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        axis.plot(x, train, color=colour, linewidth=0.9, alpha=0.85)
        axis.plot(x, test, color=colour, linewidth=2.0)
        shown = {"linestyle": "none", "marker": curve.style.marker, "markersize": 4.5, "markeredgecolor": colour}
        axis.plot(x[curve.stages], test[curve.stages], markerfacecolor=PAPER, **shown)
        axis.plot(x[-1:], test[-1:], markerfacecolor=colour, **shown)
        ends.append(Series(curve.style, x, test))
    key(axis, [("held-out starts", {"linewidth": 2.0}), ("training starts", {"linewidth": 0.9})])
    name_ends(axis, ends)


def plot_profile(
    axis: "matplotlib.axes.Axes", lines: list[Series], *, ylabel: str, limits: tuple[float, float] | None
) -> None:
    """Plot |dJ/da_t| against the time step t."""
    _lines(axis, lines, limits, xlabel="time step t", ylabel=ylabel)


def spectrum(axis: "matplotlib.axes.Axes", lines: list[Series], *, limits: tuple[float, float] | None) -> None:
    """Plot positive eigenvalues of the Gauss-Newton matrix, largest first, on logarithmic axes."""
    _lines(axis, lines, limits, xlabel="eigenvalue number", ylabel="eigenvalue of the Gauss-Newton matrix")
    longest = max((line.y.size for line in lines), default=1)
    log_axis(axis.xaxis, (1.0, float(max(longest, 2))))


def model(
    axis: "matplotlib.axes.Axes",
    thick: list[Series],
    thin: list[Series],
    *,
    ylabel: str,
    limits: tuple[float, float] | None,
) -> None:
    """Plot a metric of second-order methods' quadratic models against the number of updates."""
    _lines(axis, thick, limits, xlabel="iterations", ylabel=ylabel)
    for line in thin:
        axis.plot(line.x, np.where(line.y > 0, line.y, np.nan), color=line.style.colour, linewidth=0.9)
    if thin:
        key(axis, [("largest curvature", {"linewidth": 2.0}), ("damping", {"linewidth": 0.9})])


def path(axis: "matplotlib.axes.Axes", series: list[tuple[Series, Array]]) -> None:
    """Plot predicted (dashed) and true improvement of each candidate against its damping."""
    drawn = [y[y > 0] for line, true in series for y in (line.y, true)]
    log_axis(axis.xaxis, (min(line.x.min() for line, _ in series), max(line.x.max() for line, _ in series)))
    log_axis(axis.yaxis, (min(y.min() for y in drawn if y.size), max(y.max() for y in drawn if y.size)))
    axis.set_xlabel("damping")
    axis.set_ylabel("improvement of the return")
    for line, true in series:
        line_style = {"color": line.style.colour, "marker": line.style.marker, "markersize": 4}
        # Several damping grids are concatenated: draw no line from the end of one to the start of the next.
        ends = np.flatnonzero(np.diff(line.x) < 0) + 1
        for x, predicted, improved in zip(*(np.split(column, ends) for column in (line.x, line.y, true)), strict=True):
            axis.plot(x, np.where(predicted > 0, predicted, np.nan), linestyle="--", linewidth=0.9, **line_style)
            axis.plot(x, np.where(improved > 0, improved, np.nan), linewidth=2.0, **line_style)
    key(axis, [("true", {"linewidth": 2.0}), ("predicted", {"linewidth": 0.9, "linestyle": "--"})])
    name_ends(axis, [Series(line.style, line.x, true) for line, true in series])


def plot_rates(axis: "matplotlib.axes.Axes", series: list[tuple[Style, list[RatePoint]]]) -> None:
    """Plot final returns against the learning rate: held-out filled with its interval, training hollow, the best ringed."""
    columns = [[p.train, p.test] for _, points in series for p in points]
    sign = return_axis(axis, [np.array(column) for column in columns])
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    ends = []
    for style, points in series:
        x = np.array([p.x for p in points])
        train, test, low, high = (_finite(sign * np.array(y)) for y in list(zip(*points, strict=True))[1:5])
        axis.vlines(x, low, high, color=style.colour, linewidth=1.5, alpha=0.6)
        shown = {"color": style.colour, "marker": style.marker, "markersize": 5.5}
        axis.plot(x, train, linewidth=0.9, linestyle="--", markerfacecolor=PAPER, **shown)
        axis.plot(x, test, linewidth=1.6, **shown)
        ring = [i for i, p in enumerate(points) if p.best]
        axis.plot(
            x[ring], test[ring], "o", markersize=14, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.1
        )
        ends.append(Series(style, x, test))
    rates = sorted({p.x for _, points in series for p in points})
    if len(rates) == 1:
        axis.set_xlim(rates[0] / 3, rates[0] * 3)
    if len(rates) <= 8:
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.set_xticks([], minor=True)
    hollow = {"linewidth": 0.9, "linestyle": "--", "marker": "o", "markersize": 4.5, "markerfacecolor": PAPER}
    key(axis, [("held-out starts", {"linewidth": 1.6, "marker": "o", "markersize": 4.5}), ("training starts", hollow)])
    name_ends(axis, ends)


def return_axis(axis: "matplotlib.axes.Axes", values: list[Array]) -> float:
    """Set up the y axis for returns of any magnitude; return the factor on returns, -1 if costs are shown."""
    finite = np.concatenate([y[np.isfinite(y)] for y in values]) if values else np.array([])
    if finite.size and finite.max() < 0:
        axis.set_ylabel(f"cost ({MINUS}return), lower is better")
        log_axis(axis.yaxis, (float(-finite.max()), float(-finite.min())))
        return -1.0
    axis.set_ylabel("return, higher is better")
    size = np.abs(finite[finite != 0])
    if size.size and size.max() > 50 * np.median(size):
        axis.set_yscale("symlog", linthresh=float(np.median(size)))
    axis.yaxis.set_major_formatter(lambda y, _: compact(y))
    return 1.0


def effort_axis(axis: "matplotlib.axes.Axes", values: list[Array], xlabel: str) -> None:
    """Set up a logarithmic x axis that includes zero."""
    axis.set_xlabel(xlabel)
    positive = np.concatenate([x[x > 0] for x in values] or [np.array([])])
    if positive.size == 0:
        return
    low, high = float(positive.min()), float(positive.max())
    axis.set_xscale("symlog", linthresh=low, linscale=0.35)
    axis.set_xlim(-0.12 * low if any((x <= 0).any() for x in values) else low * 0.9, high * 1.06)
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [c * 10.0**k for k in exponents for c in steps if low <= c * 10.0**k <= high * 1.05]
    axis.set_xticks([0.0, *ticks], [compact(x) for x in [0.0, *ticks]])
    axis.set_xticks([], minor=True)


def log_axis(side: Any, limits: tuple[float, float]) -> None:
    """Set up a logarithmic axis with at least about four plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = limits
    decades = math.log10(high / low)
    {"x": side.axes.set_xscale, "y": side.axes.set_yscale}[side.axis_name]("log")
    steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    if decades < 0.5:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8)
    pad = max(1.15, (high / low) ** 0.05)
    side.axes.set(**{f"{side.axis_name}lim": (low / pad, high * pad)})
    side.set_major_locator(LogLocator(base=10, subs=steps, numticks=9))
    side.set_major_formatter(lambda y, _: compact(y))
    side.set_minor_locator(NullLocator())


def compact(x: float) -> str:
    """Format a tick label: `0.03`, `300`, `20k`, `3M`, `10⁻⁸`."""
    if x and not 1e-4 < abs(x) < 1e12:
        mantissa, exponent = f"{x:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return (power if mantissa == "1" else f"{mantissa}·{power}").replace("-", MINUS)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= max(size, 1e4):
            return f"{x / size:g}{unit}".replace("-", MINUS)
    return f"{x:g}".replace("-", MINUS)


def key(axis: "matplotlib.axes.Axes", entries: list[tuple[str, dict[str, Any]]]) -> None:
    """Add a small grey legend of line styles: the names at the curves explain the colours."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=MUTED, label=label, **style) for label, style in entries]
    legend = axis.legend(handles=handles, fontsize=8.5, labelcolor=INK, frameon=True, framealpha=0.85, borderpad=0.4)
    legend.get_frame().set(facecolor=PAPER, edgecolor="none")


def name_ends(axis: "matplotlib.axes.Axes", lines: list[Series]) -> None:
    """Write each curve's name right of the axis, linked to its end; names that would overlap are moved apart."""
    gap = 0.066
    ends = []
    for line in lines:
        seen = np.flatnonzero(np.isfinite(line.y) & (line.y > 0 if axis.get_yscale() == "log" else True))
        if seen.size:
            x, y = float(line.x[seen[-1]]), float(line.y[seen[-1]])
            height = axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[1]
            ends.append([min(max(height, 0.0), 1.0), x, y, line.style])
    ends.sort(key=lambda end: end[0])
    places = np.array([end[0] for end in ends])
    for _ in range(200):  # neighbours that are too close push each other apart, within the axis
        short = gap - np.diff(places)
        push = np.where(short > 1e-6, 0.5 * short, 0.0)
        places = np.clip(places + np.append(0.0, push) - np.append(push, 0.0), 0.0, 1.0)
    for place, (_, x, y, style) in zip(places.tolist(), ends, strict=True):
        axis.annotate(
            style.label if len(style.label) <= 16 else style.label[:15] + "…",
            (x, y),
            xytext=(1.035, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=style.colour,
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _lines(
    axis: "matplotlib.axes.Axes", lines: list[Series], limits: tuple[float, float] | None, *, xlabel: str, ylabel: str
) -> None:
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if limits is not None:
        log_axis(axis.yaxis, limits)
    for i, line in enumerate(lines):
        y = np.where(line.y > 0, line.y, np.nan)
        width = 1.5 + min(0.9, 2.5 / len(lines)) * (
            len(lines) - 1 - i
        )  # coinciding lines are visible inside each other
        markers = {"marker": line.style.marker, "markersize": 3.5} if line.y.size < 40 else {}
        axis.plot(line.x, y, color=line.style.colour, linewidth=width, **markers)
    name_ends(axis, lines)


def _finite(y: Array) -> Array:
    return np.where(np.isfinite(y), y, np.nan)
