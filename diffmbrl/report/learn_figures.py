"""The figures of agents that learned: return against real steps and time, what they say, and what their models foresee."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmbrl.render import palette
from diffmbrl.report import figures, gallery
from diffmbrl.report.figures import Series, Style
from diffmbrl.report.learning_curves import AgentCurve
from diffmbrl.report.plans import panels
from diffmbrl.runs.statistics import interquartile_mean, interval

Array = np.ndarray
Picture = gallery.Picture
NAMED = {  # what an agent may say: title, name of the axis, what it is
    "model_error": (
        "Model error",
        "hold-out error of the model",
        "Of the model on transitions that it was not fitted to, as the agent measures it at each fit: in the loss of its own "
        "model, which agents may not have in common. Of a probabilistic model it is the negative log-likelihood.",
    ),
    "disagreement": (
        "Disagreement of the ensemble",
        "disagreement of the members",
        "How far the members' predictions are apart: where it is small and the model wrong, the members are wrong together.",
    ),
}
SAID = 12  # numbers that an agent says drawn at most
POINTS = 300  # of a curve, at most


class Band(NamedTuple):
    """A curve with an interval."""

    style: Style
    x: Array
    y: Array
    low: Array
    high: Array


def learn_pictures(courses: list[AgentCurve], scene: dict[str, Any], folder: Path) -> list[Picture]:
    """Draws what the data allow, saves it, and returns it for the report."""
    folder.mkdir(exist_ok=True)
    looks = {course.method: figures.style_of(course.label, index=i) for i, course in enumerate(courses)}
    measured = [course for course in courses if course.measured]
    pictures = _returns(measured, looks, folder)
    pictures += [picture for name in NAMED for picture in _said(name, courses, looks, folder)]
    pictures += _foresight(courses, looks, scene, folder)
    return pictures + [picture for course in courses for picture in _rest(course, looks[course.method], folder)]


def _returns(courses: list[AgentCurve], looks: dict[str, Style], folder: Path) -> list[Picture]:
    if not courses:
        return []
    thin = any(course.evaluated.any() and course.trained[0].size > 1 for course in courses)
    caption = (
        "Interquartile mean over seeds, with its 95% bootstrap interval, of evaluations without exploration"
        + (", thick; thin, of the episodes from which the agent learns" if thin else "")
        + ". Real steps are those of one seed."
    )
    where = {course.method: course.curve[0] for course in courses}
    clock = {course.method: _at(course, course.curve[0]) for course in courses}

    def paint(along: dict[str, Array], xlabel: str, also: bool) -> Callable[[Any], None]:
        return lambda axis: _return_bands(axis, courses, looks, along, xlabel, also)

    on_steps, on_time = paint(where, "real steps", True), paint(clock, "seconds of learning, all seeds together", False)
    time = "The same against the seconds of updates and real steps, without compiling and evaluating."
    pictures = [gallery.plot(folder, "return-steps", "Return", "Return against real steps", caption, on_steps)]
    return [*pictures, gallery.plot(folder, "return-seconds", "Return", "Return against time", time, on_time)]


def _return_bands(
    axis: Any, courses: list[AgentCurve], looks: dict[str, Style], along: dict[str, Array], xlabel: str, also: bool
) -> None:
    earned = {c.method: c.trained for c in courses if also and c.evaluated.any() and c.trained[0].size > 1}
    thin = {m: (x[_few(x)], interquartile_mean(y[_few(x)])) for m, (x, y) in earned.items()}
    sign = figures.return_axis(axis, [*(course.means for course in courses), *(y for _, y in thin.values())])
    lines = []
    for course in courses:
        y, style = course.curve[1], looks[course.method]
        low, high = interval(y, resamples=gallery.BAND)
        lines.append(_band(axis, Band(style, along[course.method], *(sign * z for z in (course.means, low, high)))))
    for method, (x, y) in thin.items():
        axis.plot(x, _shown(sign * y), color=looks[method].colour, linewidth=0.9, alpha=0.85)
    axis.set_xlabel(xlabel)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda x, _: figures.compact(x))
    figures.name_ends(axis, lines)


def _said(name: str, courses: list[AgentCurve], looks: dict[str, Style], folder: Path) -> list[Picture]:
    """Something that agents say under a name of `NAMED`, of all that do."""
    title, ylabel, caption = NAMED[name]
    saying = [(course, course.said[name]) for course in courses if name in course.said]
    if not saying:
        return []

    def paint(axis: Any) -> None:
        bands = []
        for course, values in saying:
            spoken = np.flatnonzero(~np.isnan(values).all(axis=1))
            spoken = spoken[_few(spoken)]
            low, high = interval(values[spoken], resamples=gallery.BAND)
            middle = interquartile_mean(values[spoken])
            bands.append(Band(looks[course.method], course.steps[spoken], middle, low, high))
        _positive(axis, [y for band in bands for y in (band.y, band.low, band.high)])
        lines = [_band(axis, band) for band in bands]
        axis.set_xlabel("real steps")
        axis.set_ylabel(ylabel)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(lambda x, _: figures.compact(x))
        figures.name_ends(axis, lines)

    return [gallery.plot(folder, name.replace("_", "-"), "Model", title, caption, paint)]


def _foresight(
    courses: list[AgentCurve], looks: dict[str, Style], scene: dict[str, Any], folder: Path
) -> list[Picture]:
    """Errors of the models' rollouts, and one trajectory of each beside the true one."""
    seeing = [(course, course.foresight) for course in courses if course.foresight is not None]
    if not seeing:
        return []

    def paint(axis: Any) -> None:
        bands, spreads = [], []
        for course, found in seeing:
            error, spread = (np.asarray(found[name], float) for name in ("error", "spread"))
            k = np.arange(1, error.shape[1] + 1)
            going = ~np.isnan(error).any(axis=0)
            middle, ends = (
                np.median(error[:, going], axis=0),
                (error[:, going].min(axis=0), error[:, going].max(axis=0)),
            )
            bands.append(Band(looks[course.method], k[going], middle, *ends))
            if np.any(spread > 0):  # a model without noise, planned on at its mean, has none
                spreads.append((looks[course.method], k[going], np.median(spread[:, going], axis=0)))
        _positive(axis, [*(y for band in bands for y in (band.low, band.high)), *(y for *_, y in spreads)])
        for style, k, y in spreads:
            axis.plot(k, _shown(np.where(y > 0, y, np.nan)), color=style.colour, linewidth=1.1, linestyle="--")
        lines = [_band(axis, band) for band in bands]
        axis.set_xlabel("steps ahead")
        axis.set_ylabel("error, in standard deviations of the states")
        if spreads:
            figures.key(axis, [("error", {"linewidth": 2.0}), ("spread of the particles", {"linestyle": "--"})])
        figures.name_ends(axis, lines)

    caption = (
        "Rollouts of the final model from starts of the task, under the actions of the true episodes: the distance of the "
        "particles' mean from the truth (median over seeds, and their range), and the particles' own spread. A spread below "
        "the error is a model that is surer than it should be."
    )
    pictures = [gallery.plot(folder, "foresight-error", "Model", "Error of the model's rollouts", caption, paint)]
    for course, found in seeing:
        true, low, middle, high = (np.asarray(found[name], float) for name in ("s", "low", "middle", "high"))
        names = list(scene.get("state_names") or [])
        names = names if len(names) == true.shape[1] else [f"state {i + 1}" for i in range(true.shape[1])]
        title = "Predicted and true trajectories" + (f", {course.label}" if len(courses) > 1 else "")
        caption = (
            "True states, dark, and the model's under the same actions, coloured: median of the particles, and the range from "
            "5% to 95% of them. The panels show the truth whole: what leaves them is far from it."
        )
        dt = float(scene.get("dt", 1.0))
        make = _trajectories(true, (low, middle, high), names, dt, looks[course.method])
        pictures.append(gallery.save_figure(folder, f"foresight-{course.method}", "Model", title, caption, make))
    return pictures


def _trajectories(
    true: Array, ahead: tuple[Array, ...], names: list[str], dt: float, style: Style
) -> Callable[[], Any]:
    def make() -> Any:
        figure, axes = panels(len(names))
        time = dt * np.arange(len(true))
        for i, (axis, name) in enumerate(zip(axes, names, strict=True)):
            low, middle, high = (_shown(x[:, i]) for x in ahead)
            axis.set_title(name, loc="left", fontsize=8.5, pad=4, parse_math=False)
            axis.fill_between(time, low, high, color=style.colour, alpha=0.2, linewidth=0)
            axis.plot(time, middle, color=style.colour, linewidth=1.5)
            axis.plot(time, true[:, i], color=palette.INK, linewidth=1.2)
            seen = true[:, i]
            room = 0.5 * (seen.max() - seen.min()) or 0.1 * max(abs(float(seen[0])), 0.1)
            axis.set_ylim(seen.min() - room, seen.max() + room)
            axis.set_xlim(0, time[-1])
        return figure

    return make


def _rest(course: AgentCurve, style: Style, folder: Path) -> list[Picture]:
    """Whatever else an agent says, each in a panel."""
    said = {name: x for name, x in course.said.items() if name not in NAMED}
    if not said or len(course.steps) < 3:
        return []

    def make() -> Any:
        figure, axes = panels(min(len(said), SAID), xlabel="real steps")
        for axis, (name, values) in zip(axes, said.items(), strict=False):
            axis.set_title(name.replace("_", " "), loc="left", fontsize=8.5, pad=4, parse_math=False)
            few, looks = _few(values), {"color": style.colour, "linewidth": 1.1, "alpha": max(0.3, course.seeds**-0.5)}
            axis.plot(course.steps[few], _shown(values[few]), **looks)
            axis.xaxis.set_major_formatter(lambda x, _: figures.compact(x))
            axis.yaxis.set_major_formatter(lambda x, _: figures.compact(round(x, 12)))
        return figure

    caption = "As the agent gives it at each update, one line a seed."
    caption += f" {len(said) - SAID} more are in metrics.jsonl." if len(said) > SAID else ""
    return [
        gallery.save_figure(folder, f"said-{course.method}", "What the agents say", f"{course.label}", caption, make)
    ]


def _band(axis: Any, band: Band) -> Series:
    """The curve with its interval; a marker where there is one point alone."""
    style, y = band.style, _shown(band.y)
    axis.fill_between(band.x, _shown(band.low), _shown(band.high), color=style.colour, alpha=0.16, linewidth=0)
    axis.plot(band.x, y, color=style.colour, linewidth=2.0)
    axis.plot(band.x[-1:], y[-1:], style.marker, color=style.colour, markersize=4.5)
    return Series(style, band.x, y)


def _positive(axis: Any, values: list[Array]) -> None:
    """A logarithmic axis around what is positive, if all of it is."""
    finite = np.concatenate([y[np.isfinite(y)] for y in values])
    if finite.size and finite.min() > 0 and finite.max() > 3 * finite.min():
        figures.log_axis(axis.yaxis, (float(finite.min()), float(finite.max())))


def _at(course: AgentCurve, steps: Array) -> Array:
    """Seconds of learning at so many real steps."""
    return course.seconds[np.searchsorted(course.steps, steps)]


def _few(values: Array) -> Array:
    """Which of the values are drawn: all, or some at even distances with the first and the last."""
    return np.unique(np.linspace(0, len(values) - 1, min(POINTS, len(values))).astype(int))


def _shown(y: Array) -> Array:
    return np.where(np.isfinite(y), y, np.nan)
