"""The figures of a diagnosis: gradient norms, signal, errors, bias, growth and contributions, against the horizon."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmbrl.render.palette import INK, MUTED, PALETTE
from diffmbrl.report import figures, gallery
from diffmbrl.report.figures import Series, Style

if TYPE_CHECKING:
    import matplotlib.axes

Record = dict[str, Any]
Array = np.ndarray
LEAST = 1e-17  # smaller relative errors are drawn here


def health_pictures(rows: list[Record], verdict: Record, folder: Path) -> list[gallery.Picture]:
    """Draw and save the figures of a diagnosis."""
    folder.mkdir(exist_ok=True)
    T = np.array([row["horizon"] for row in rows], float)
    batch = verdict.get("batch", 128)
    kinds: list[tuple[str, str, str, Callable[[Any], None]]] = [
        (
            "norms",
            "Gradient norms",
            "Of one rollout: median, and the range from the lowest to the highest tenth; and of the mean over all starts. A "
            "mean far below the median shows cancellation; far above it, few starts dominate.",
            lambda axis: _norms(axis, T, rows),
        ),
        (
            "signal",
            "Signal and noise",
            f"Signal-to-noise ratio of one rollout. Below the dashed line a batch of {batch} is mostly noise. The smoothed "
            "ones are of the return with noise on the actions, with the starts repeated: compare them with each other. "
            "A missing point: the samples do not distinguish the mean from 0.",
            lambda axis: _signal(axis, T, rows, batch),
        ),
        (
            "errors",
            "Errors of the gradient",
            "Relative error of the float32 gradient, of the float64 gradient against central differences, and the change "
            "when the integrator's step is halved. The dashed line is 1%.",
            lambda axis: _errors(axis, T, rows, verdict.get("float32_bound", 0.01)),
        ),
        (
            "bias",
            "Pathwise against score function",
            "Their difference along a direction fitted to half of the samples, measured on the other half, in multiples "
            "of the gradient, with two standard errors. Away from 0 the pathwise gradient is biased.",
            lambda axis: _bias(axis, T, rows),
        ),
        (
            "curvature",
            "Growth and curvature",
            "The factor by which the closed loop multiplies perturbations over the horizon, and the largest eigenvalue of the "
            "Gauss-Newton matrix.",
            lambda axis: _curvature(axis, T, rows),
        ),
        (
            "contributions",
            "Where in time the gradient comes from",
            "Norm of each time step's part of dJ/dtheta, for each horizon.",
            lambda axis: _contributions(axis, rows),
        ),
    ]
    return [gallery.plot(folder, name, "Figures", title, caption, paint) for name, title, caption, paint in kinds]


def _norms(axis: "matplotlib.axes.Axes", T: Array, rows: list[Record]) -> None:
    norms = [np.asarray(row["norms"], float) for row in rows]
    low, middle, high = (np.array([_quantile(x, q) for x in norms]) for q in (0.1, 0.5, 0.9))
    one, mean = _style("one rollout", 0), _style("mean", 1)
    drawn = [Series(one, T, middle), Series(mean, T, _column(rows, "plain_norm"))]
    axis.fill_between(T, np.where(low > 0, low, np.nan), high, color=one.colour, alpha=0.16, linewidth=0)
    _against(axis, T, drawn, "norm of the gradient", also=[low, high])


def _signal(axis: "matplotlib.axes.Axes", T: Array, rows: list[Record], batch: int) -> None:
    drawn = [
        Series(_style("BPTT", 0), T, _column(rows, "plain_snr")),
        Series(_style("BPTT, smoothed", 1), T, _column(rows, "pathwise_snr")),
        Series(_style("score function", 2), T, _column(rows, "score_snr")),
    ]
    _against(axis, T, drawn, "signal-to-noise ratio of one rollout", also=[np.array([1 / batch])])
    _level(axis, 1 / batch)


def _errors(axis: "matplotlib.axes.Axes", T: Array, rows: list[Record], bound: float) -> None:
    names = [("float32", "float32"), ("differences", "difference"), ("dt / 2", "refinement")]
    drawn = [Series(_style(label, i), T, _column(rows, key)) for i, (label, key) in enumerate(names)]
    drawn = [line._replace(y=np.maximum(line.y, LEAST)) for line in drawn if np.isfinite(line.y).any()]
    _against(axis, T, drawn, "relative error", also=[np.array([bound])])
    _level(axis, bound)


def _bias(axis: "matplotlib.axes.Axes", T: Array, rows: list[Record]) -> None:
    size, error = _column(rows, "bias_size"), _column(rows, "bias_error")
    style = _style("difference", 0)
    _horizons(axis, T)
    axis.axhline(0.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    axis.errorbar(T, size, yerr=2 * error, color=style.colour, marker="o", markersize=4.5, linewidth=1.2, capsize=3)
    # A test of noise alone must not hide the others.
    seen = np.abs(size) + 2 * error
    if np.isfinite(seen).any():
        reach = max(1.5, 1.1 * min(float(np.nanmax(seen)), 5.0))
        axis.set_ylim(-reach, reach)
    axis.set_ylabel("difference, in gradients")


def _curvature(axis: "matplotlib.axes.Axes", T: Array, rows: list[Record]) -> None:
    drawn = [
        Series(_style("perturbations", 0), T, _column(rows, "swell")),
        Series(_style("curvature", 1), T, _column(rows, "curvature")),
    ]
    _against(axis, T, drawn, "growth, largest eigenvalue")


def _contributions(axis: "matplotlib.axes.Axes", rows: list[Record]) -> None:
    drawn = [
        Series(
            _style(f"T = {row['horizon']}", i),
            np.arange(len(row["contributions"])),
            np.asarray(row["contributions"], float),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    finite = [y[np.isfinite(y) & (y > 0)] for y in (line.y for line in drawn)]
    top = max((float(y.max()) for y in finite if y.size), default=1.0)
    limits = _range([y[y > gallery.FLOOR * top] for y in finite])
    figures.plot_profile(axis, drawn, ylabel="norm of the step's part of dJ/dθ", limits=limits)


def _against(
    axis: "matplotlib.axes.Axes", T: Array, lines: list[Series], ylabel: str, *, also: list[Array] | None = None
) -> None:
    """Plot lines against the horizon, with logarithmic axes and names at the ends."""
    _horizons(axis, T)
    figures.log_axis(axis.yaxis, _range([*(line.y for line in lines), *(also or [])]))
    axis.set_ylabel(ylabel)
    for line in lines:
        y = np.where(np.isfinite(line.y) & (line.y > 0), line.y, np.nan)
        axis.plot(T, y, color=line.style.colour, marker=line.style.marker, markersize=4.5, linewidth=1.6)
    figures.name_ends(axis, lines)


def _horizons(axis: "matplotlib.axes.Axes", T: Array) -> None:
    figures.log_axis(axis.xaxis, _range([T]))
    axis.set_xlabel("horizon T")
    axis.set_xticks(T, [f"{x:g}" for x in T])
    axis.set_xticks([], minor=True)


def _level(axis: "matplotlib.axes.Axes", y: float) -> None:
    axis.axhline(y, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))


def _range(values: list[Array]) -> tuple[float, float]:
    """Return the range of the finite positive values, never empty."""
    finite = np.concatenate([np.atleast_1d(y)[np.isfinite(y) & (y > 0)] for y in values])
    if finite.size == 0:
        return 0.1, 10.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > 1.01 * low else (low / 3, high * 3)


def _style(label: str, index: int) -> Style:
    return Style(label, PALETTE[index % len(PALETTE)], figures.MARKERS[index % len(figures.MARKERS)])


def _column(rows: list[Record], key: str) -> Array:
    return np.array([np.nan if row[key] is None else float(row[key]) for row in rows])


def _quantile(x: Array, q: float) -> float:
    finite = x[np.isfinite(x)]
    return float(np.quantile(finite, q)) if finite.size else float("nan")
