"""The figures of a comparison, and saving any figure as `figures/<name>.png` and `.svg` with reproducible bytes."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmbrl.render import palette
from diffmbrl.report import figures, words
from diffmbrl.report.arms import Arm
from diffmbrl.report.figures import Curve, RatePoint, Series, Style
from diffmbrl.report.table import Summary
from diffmbrl.runs.folder import write_atomic
from diffmbrl.runs.statistics import interquartile_mean, interval

BAND = 2000  # bootstrap resamples of a band, which is drawn and not quoted
FLOOR = 1e-12  # eigenvalues and gradients below this share of the largest are rounding


class Picture(NamedTuple):
    """A figure of the report."""

    name: str
    group: str
    title: str
    caption: str
    svg: str


def comparison_figures(summary: Summary, folder: Path) -> list[Picture]:
    """Draw and save every figure that the summary allows."""
    styles = styles_of(summary)
    arms = [row.arm for row in summary.rows if row.measured]
    pictures = [
        *_returns(arms, styles),
        *_profiles(summary, styles),
        *_spreads(arms, styles),
        *_spectra(summary, styles),
        *_models(arms, styles),
        *_sweep(summary, styles),
    ]
    folder.mkdir(exist_ok=True)
    return [plot(folder, *picture) for picture in pictures]


def styles_of(summary: Summary) -> dict[str, Style]:
    """Return the style of each method, in the order of the rows."""
    return {row.arm.method: figures.style_of(row.arm.label, index=i) for i, row in enumerate(summary.rows)}


Sketch = tuple[str, str, str, str, Callable[[Any], None]]


def _returns(arms: list[Arm], styles: dict[str, Style]) -> list[Sketch]:
    if not arms:
        return []
    curves = {arm.method: _curve(arm, styles[arm.method]) for arm in arms}
    shared = [f"{arm.label} ({arm['lanes'][-1]:.0f} replicas)" for arm in arms if arm["lanes"][-1] > arm.seeds]
    clock = f" One clock ran for all rates at once: {words.join_words(shared)}." if shared else ""
    stages = (
        " Hollow markers: the discount of the objective was raised." if any(arm.continuation for arm in arms) else ""
    )
    kinds = [
        (
            "sequential",
            "sequential rollouts per seed",
            "Return against sequential depth",
            "Rollouts that must run one after another: the time that remains on a machine that runs all else in parallel. "
            "Curves further left need less depth for the same return.",
        ),
        (
            "seconds",
            "seconds, all seeds together",
            "Return against time",
            "Execution alone, without compiling and evaluating, on the device named below." + clock,
        ),
        (
            "evaluations",
            "dynamics evaluations per seed (forward + jvp + vjp)",
            "Return against work",
            "Every step of the dynamics, and every tangent and cotangent pushed through one, counts as one. "
            "A method that leads here but not against time spends time on other computations.",
        ),
        (
            "iterations",
            "iterations",
            "Return against iterations",
            "An iteration of a second-order method costs far more than one of a first-order method: this shows stability, "
            "not speed. A thick curve far from its thin one is overfitting." + stages,
        ),
    ]

    def sketch(measure: str, xlabel: str) -> Callable[[Any], None]:
        along = [curves[arm.method]._replace(x=_effort(arm, measure)) for arm in arms]
        return lambda axis: figures.plot_returns(axis, along, xlabel=xlabel)

    return [(f"return-{m}", "Return", title, caption, sketch(m, xlabel)) for m, xlabel, title, caption in kinds]


def _effort(arm: Arm, measure: str) -> np.ndarray:
    if measure == "iterations":
        return arm["update"]
    if measure == "seconds":
        return arm["seconds"]
    return (arm["sequential"] if measure == "sequential" else arm.dynamics).mean(axis=1)


def _curve(arm: Arm, style: Style) -> Curve:
    low, high = interval(arm["test"], resamples=BAND)
    ends = np.cumsum([stage[1] for stage in arm.continuation[:-1]])
    stages = np.unique([np.searchsorted(arm["update"], end) for end in ends if end < arm["update"][-1]]).astype(int)
    means = interquartile_mean(arm["train"]), interquartile_mean(arm["test"])
    return Curve(style, arm["update"], *means, low, high, stages)


def _profiles(summary: Summary, styles: dict[str, Style]) -> list[Sketch]:
    captions = {
        "start": "RMS over starts and seeds, before the first update. A slope is a gradient that grows or vanishes on its "
        "way back through time: a factor of 1,000 between the ends is a badly conditioned problem.",
        "end": "The same after training, on the same scale: a good policy stabilises the closed loop and flattens it.",
    }
    lines = {w: [(r.arm, r.arm.profiles[w]) for r in summary.rows if w in r.arm.profiles] for w in captions}

    def sketch(when: str, limits: tuple[float, float] | None) -> Callable[[Any], None]:
        shown = [Series(styles[arm.method], np.arange(len(y)), y) for arm, y in lines[when]]
        return lambda axis: figures.plot_profile(axis, shown, ylabel="RMS of |dJ/da_t|", limits=limits)

    limits = _limits([y for w in captions for _, y in lines[w]])
    return [
        (f"gradient-{w}", "Gradient", f"Gradient per time step, {w}", captions[w], sketch(w, limits))
        for w in captions
        if lines[w]
    ]


def _spreads(arms: list[Arm], styles: dict[str, Style]) -> list[Sketch]:
    """Plot the spread of single rollouts' gradients along the run: medians over seeds."""
    kinds = [
        (
            "snr",
            "signal-to-noise ratio of one rollout",
            "Signal and noise",
            "Of the BPTT gradient of the full objective, over the training starts: the size of the mean against the spread. "
            "Its inverse is the batch size at which both are equal. It falls towards an optimum, and where starts disagree.",
        ),
        (
            "tail",
            "share of variance in the top 1% of starts",
            "Heavy tail",
            "Near 1 one or two starts dominate the gradient: clip it, limit the step, or use more starts. `diffmbrl diagnose` "
            "shows details.",
        ),
    ]
    sketches: list[Sketch] = []
    for name, ylabel, title, caption in kinds:
        lines = [Series(styles[arm.method], arm["update"], _middle(arm[f"spread_{name}"])) for arm in arms]
        lines = [line for line in lines if np.any(line.y > FLOOR)]
        if lines:
            sketches.append((f"gradient-{name}", "Gradient", title, caption, _model_sketch(lines, [], ylabel)))
    return sketches


def _spectra(summary: Summary, styles: dict[str, Style]) -> list[Sketch]:
    lines = {
        w: [(r.arm, _above_rounding(r.arm.spectra[w])) for r in summary.rows if w in r.arm.spectra]
        for w in ("start", "end")
    }

    def condition(when: str) -> str:
        parts = [f"{arm.label} {words.format_number(float(y[0]))}" for arm, y in lines[when] if y.size]
        return f" Largest: {', '.join(parts)}." if parts else ""

    captions = {
        "start": "G'MG before the first update, largest first. A first-order method's rate is bounded by the largest "
        "eigenvalue, and its progress along the others is slower by their ratio to it." + condition("start"),
        "end": "The same after training, on the same scale." + condition("end"),
    }
    values = np.concatenate([y for w in lines for _, y in lines[w]] or [np.array([])])
    limits = (float(values.min()), float(values.max())) if values.size else None

    def sketch(when: str) -> Callable[[Any], None]:
        shown = [Series(styles[arm.method], np.arange(1, len(y) + 1), y) for arm, y in lines[when]]
        return lambda axis: figures.spectrum(axis, shown, limits=limits)

    return [(f"spectrum-{w}", "Curvature", f"Spectrum, {w}", captions[w], sketch(w)) for w in lines if lines[w]]


def _models(arms: list[Arm], styles: dict[str, Style]) -> list[Sketch]:
    """Plot metrics of second-order methods' quadratic models along the run: medians over updates and seeds."""
    kinds = [
        (
            "gap",
            "projection gap",
            "Projection gap",
            "How much of the planner's step the policy's step misses, in the metric of M: 0 when the policy follows iLQR "
            "around its own closed loop, 1 when the step contains nothing of it.",
        ),
        (
            "agreement",
            "true over predicted improvement",
            "Model against truth",
            "Of the step taken: 1 where the quadratic model is right, below it where the true improvement is smaller.",
        ),
        (
            "curvature",
            "curvature and damping",
            "Largest curvature and the damping chosen",
            "The largest Ritz value, thick, and the damping of the step taken, thin. Directions of less curvature than the "
            "damping hardly move.",
        ),
        (
            "negative",
            "share of negative curvature",
            "Negative curvature",
            "The negative Ritz values' share of the sum of absolute values, for methods that use the true Hessian.",
        ),
    ]
    sketches: list[Sketch] = []
    for name, ylabel, title, caption in kinds:
        lines = [(styles[arm.method], arm["update"], _middle(arm[name]), _middle(arm["damping"])) for arm in arms]
        lines = [line for line in lines if np.any(line[2] > FLOOR)]
        if not lines:
            continue
        thick = [Series(style, x, y) for style, x, y, _ in lines]
        thin = [Series(style, x, damping) for style, x, _, damping in lines] if name == "curvature" else []
        sketches.append((f"model-{name}", "Model", title, caption, _model_sketch(thick, thin, ylabel)))
    paths = [arm for arm in arms if arm.path and np.sum(arm.path["predicted"] > 0) > 1]
    if paths:
        caption = (
            "The candidates of the first update, from the first seed: the predicted improvement, dashed, and the true "
            "one. Where they differ, the step has left the region that the model describes; the best true one is taken."
        )
        series = [
            (Series(styles[arm.method], arm.path["dampings"], arm.path["predicted"]), arm.path["improved"])
            for arm in paths
        ]
        sketches.append(("model-path", "Model", "The damping grid", caption, lambda axis: figures.path(axis, series)))
    return sketches


def _model_sketch(thick: list[Series], thin: list[Series], ylabel: str) -> Callable[[Any], None]:
    limits = _limits([line.y for line in (*thick, *thin)])
    return lambda axis: figures.model(axis, thick, thin, ylabel=ylabel, limits=limits)


def _middle(values: np.ndarray) -> np.ndarray:
    """Return medians over seeds; NaN where no seed has a number."""
    out = np.full(len(values), np.nan)
    seen = np.isfinite(values).any(axis=1)
    out[seen] = np.nanmedian(np.where(np.isfinite(values[seen]), values[seen], np.nan), axis=1)
    return out


def _sweep(summary: Summary, styles: dict[str, Style]) -> list[Sketch]:
    best = {id(row.arm) for row in summary.rows}
    series: list[tuple[Style, list[RatePoint]]] = []
    for method, style in styles.items():
        rows = [r for r in summary.arms if r.arm.method == method and r.arm.rate is not None and r.measured]
        points = [
            RatePoint(float(r.arm.rate or 0), r.train.value, *r.test, best=id(r.arm) in best)
            for r in sorted(rows, key=lambda r: r.arm.rate or 0)
        ]
        if len(points) > 1:
            series.append((style, points))
    if not series:
        return []
    caption = (
        "Final return for each rate; bars are 95% intervals over seeds. The ringed rate has the best training return and is "
        "the one shown elsewhere. If it lies at an edge, the sweep was too narrow."
    )
    return [("rates", "Learning rates", "Learning-rate sweep", caption, lambda axis: figures.plot_rates(axis, series))]


def _above_rounding(eigenvalues: np.ndarray) -> np.ndarray:
    """Return the eigenvalues, largest first, that exceed the rounding of float64."""
    finite = eigenvalues[np.isfinite(eigenvalues)]
    return finite[finite > max(1e-14 * finite.max(initial=0.0), 0.0)]


def _limits(values: list[np.ndarray]) -> tuple[float, float] | None:
    """Return the common range of positive values above the rounding of `FLOOR`."""
    finite = np.concatenate([y[np.isfinite(y) & (y > 0)] for y in values]) if values else np.array([])
    if finite.size == 0:
        return None
    high = float(finite.max())
    return float(finite[finite >= FLOOR * high].min()), high


def plot(folder: Path, name: str, group: str, title: str, caption: str, paint: Callable[[Any], None]) -> Picture:
    """Draw and save a figure with one axis."""

    def make() -> Any:
        figure, axis = figures.canvas()
        paint(axis)
        return figure

    return save_figure(folder, name, group, title, caption, make)


def save_figure(folder: Path, name: str, group: str, title: str, caption: str, make: Callable[[], Any]) -> Picture:
    """Save the figure that `make` returns in a folder, and return it for the page."""
    import matplotlib

    with matplotlib.rc_context(figures.settings(name)):
        figure = make()
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing | {"Title": title})
    write_atomic(folder / f"{name}.png", png.getvalue())
    write_atomic(folder / f"{name}.svg", svg.getvalue())
    return Picture(name, group, title, caption, inline(svg.getvalue().decode(), name=name, title=title))


def inline(svg: str, *, name: str, title: str) -> str:
    """Prepare an SVG for a page: no prolog, no metadata, unique ids, and colours of the page's theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    themed = {palette.INK: "--ink", palette.MUTED: "--muted", palette.RULE: "--rule", palette.PAPER: "--paper"}
    for colour, variable in (themed | {colour: f"--m{i}" for i, colour in enumerate(palette.PALETTE)}).items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()
