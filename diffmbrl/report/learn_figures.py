"""The figures of learning agents: return against real steps and time, their own metrics, and their models' rollouts."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffmbrl.render import palette
from diffmbrl.report import figures, gallery
from diffmbrl.report.figures import Series, Style
from diffmbrl.report.learning_curves import AgentCurve
from diffmbrl.report.plans import panels
from diffmbrl.runs.statistics import interquartile_mean, interval

if TYPE_CHECKING:
    import matplotlib.axes

Array = np.ndarray
Picture = gallery.Picture
NAMED = {  # metrics of agents with a figure of their own: title, label of the axis, caption
    "model_error": (
        "Model error",
        "hold-out error of the model",
        "Loss of the model on transitions that it was not fitted to, measured by the agent at each fit. Agents may have "
        "different losses; for a probabilistic model it is the negative log-likelihood.",
    ),
    "disagreement": (
        "Disagreement of the ensemble",
        "disagreement of the members",
        "Distance of the members' predictions. Where it is small and the model wrong, all members make the same error.",
    ),
}
OTHERS = 12  # other metrics drawn at most
POINTS = 300  # points of a curve at most


class Band(NamedTuple):
    """A curve with an interval."""

    style: Style
    x: Array
    y: Array
    low: Array
    high: Array


def learn_pictures(agents: list[AgentCurve], scene: dict[str, Any], folder: Path) -> list[Picture]:
    """Draw and save every figure that the records allow."""
    folder.mkdir(exist_ok=True)
    styles = {agent.method: figures.style_of(agent.label, index=i) for i, agent in enumerate(agents)}
    measured = [agent for agent in agents if agent.measured]
    pictures = _returns(measured, styles, folder)
    pictures += [picture for name in NAMED for picture in _metric(name, agents, styles, folder)]
    pictures += _model_rollouts(agents, styles, scene, folder)
    return pictures + [picture for agent in agents for picture in _rest(agent, styles[agent.method], folder)]


def _returns(agents: list[AgentCurve], styles: dict[str, Style], folder: Path) -> list[Picture]:
    if not agents:
        return []
    thin = any(agent.evaluated.any() and agent.trained[0].size > 1 for agent in agents)
    caption = (
        "Interquartile mean over seeds, with its 95% bootstrap interval, of evaluations without exploration"
        + (", thick; thin, of the episodes from which the agent learns" if thin else "")
        + ". Real steps are those of one seed."
    )
    where = {agent.method: agent.curve[0] for agent in agents}
    clock = {agent.method: _at(agent, agent.curve[0]) for agent in agents}

    def paint(along: dict[str, Array], xlabel: str, also: bool) -> Callable[[Any], None]:
        return lambda axis: _return_bands(axis, agents, styles, along, xlabel, also)

    on_steps, on_time = paint(where, "real steps", True), paint(clock, "seconds of learning, all seeds together", False)
    time = "The same against the seconds of updates and real steps, without compiling and evaluating."
    pictures = [gallery.plot(folder, "return-steps", "Return", "Return against real steps", caption, on_steps)]
    return [*pictures, gallery.plot(folder, "return-seconds", "Return", "Return against time", time, on_time)]


def _return_bands(
    axis: "matplotlib.axes.Axes",
    agents: list[AgentCurve],
    styles: dict[str, Style],
    along: dict[str, Array],
    xlabel: str,
    also: bool,
) -> None:
    earned = {c.method: c.trained for c in agents if also and c.evaluated.any() and c.trained[0].size > 1}
    thin = {m: (x[_few(x)], interquartile_mean(y[_few(x)])) for m, (x, y) in earned.items()}
    sign = figures.return_axis(axis, [*(agent.means for agent in agents), *(y for _, y in thin.values())])
    lines = []
    for agent in agents:
        y, style = agent.curve[1], styles[agent.method]
        low, high = interval(y, resamples=gallery.BAND)
        lines.append(_band(axis, Band(style, along[agent.method], *(sign * z for z in (agent.means, low, high)))))
    for method, (x, y) in thin.items():
        axis.plot(x, _shown(sign * y), color=styles[method].colour, linewidth=0.9, alpha=0.85)
    axis.set_xlabel(xlabel)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda x, _: figures.compact(x))
    figures.name_ends(axis, lines)


def _metric(name: str, agents: list[AgentCurve], styles: dict[str, Style], folder: Path) -> list[Picture]:
    """Draw one metric of `NAMED` for all agents that report it."""
    title, ylabel, caption = NAMED[name]
    reporting = [(agent, agent.metrics[name]) for agent in agents if name in agent.metrics]
    if not reporting:
        return []

    def paint(axis: "matplotlib.axes.Axes") -> None:
        bands = []
        for agent, values in reporting:
            given = np.flatnonzero(~np.isnan(values).all(axis=1))
            given = given[_few(given)]
            low, high = interval(values[given], resamples=gallery.BAND)
            middle = interquartile_mean(values[given])
            bands.append(Band(styles[agent.method], agent.steps[given], middle, low, high))
        _positive(axis, [y for band in bands for y in (band.y, band.low, band.high)])
        lines = [_band(axis, band) for band in bands]
        axis.set_xlabel("real steps")
        axis.set_ylabel(ylabel)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(lambda x, _: figures.compact(x))
        figures.name_ends(axis, lines)

    return [gallery.plot(folder, name.replace("_", "-"), "Model", title, caption, paint)]


def _model_rollouts(
    agents: list[AgentCurve], styles: dict[str, Style], scene: dict[str, Any], folder: Path
) -> list[Picture]:
    """Draw the errors of the models' rollouts, and one trajectory of each with the true one."""
    modelling = [(agent, agent.model_rollouts) for agent in agents if agent.model_rollouts is not None]
    if not modelling:
        return []

    def paint(axis: "matplotlib.axes.Axes") -> None:
        bands, spreads = [], []
        for agent, found in modelling:
            error, spread = (np.asarray(found[name], float) for name in ("error", "spread"))
            k = np.arange(1, error.shape[1] + 1)
            going = ~np.isnan(error).any(axis=0)
            middle, ends = (
                np.median(error[:, going], axis=0),
                (error[:, going].min(axis=0), error[:, going].max(axis=0)),
            )
            bands.append(Band(styles[agent.method], k[going], middle, *ends))
            if np.any(spread > 0):  # a deterministic model at its mean has no spread
                spreads.append((styles[agent.method], k[going], np.median(spread[:, going], axis=0)))
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
        "the error shows an overconfident model."
    )
    pictures = [gallery.plot(folder, "foresight-error", "Model", "Error of the model's rollouts", caption, paint)]
    for agent, found in modelling:
        true, low, middle, high = (np.asarray(found[name], float) for name in ("s", "low", "middle", "high"))
        names = list(scene.get("state_names") or [])
        names = names if len(names) == true.shape[1] else [f"state {i + 1}" for i in range(true.shape[1])]
        title = "Predicted and true trajectories" + (f", {agent.label}" if len(agents) > 1 else "")
        caption = (
            "True states, dark, and the model's under the same actions, coloured: median of the particles, and the range from "
            "5% to 95% of them. The panels span the true states: curves that leave them are far off."
        )
        dt = float(scene.get("dt", 1.0))
        make = _trajectories(true, (low, middle, high), names, dt, styles[agent.method])
        pictures.append(gallery.save_figure(folder, f"foresight-{agent.method}", "Model", title, caption, make))
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


def _rest(agent: AgentCurve, style: Style, folder: Path) -> list[Picture]:
    """Draw the other metrics of an agent, one panel each."""
    metrics = {name: x for name, x in agent.metrics.items() if name not in NAMED}
    if not metrics or len(agent.steps) < 3:
        return []

    def make() -> Any:
        figure, axes = panels(min(len(metrics), OTHERS), xlabel="real steps")
        for axis, (name, values) in zip(axes, metrics.items(), strict=False):
            axis.set_title(name.replace("_", " "), loc="left", fontsize=8.5, pad=4, parse_math=False)
            few, line = _few(values), {"color": style.colour, "linewidth": 1.1, "alpha": max(0.3, agent.seeds**-0.5)}
            axis.plot(agent.steps[few], _shown(values[few]), **line)
            axis.xaxis.set_major_formatter(lambda x, _: figures.compact(x))
            axis.yaxis.set_major_formatter(lambda x, _: figures.compact(round(x, 12)))
        return figure

    caption = "As the agent reports it at each update, one line a seed."
    caption += f" {len(metrics) - OTHERS} more are in metrics.jsonl." if len(metrics) > OTHERS else ""
    return [
        gallery.save_figure(folder, f"said-{agent.method}", "Metrics of the agents", f"{agent.label}", caption, make)
    ]


def _band(axis: "matplotlib.axes.Axes", band: Band) -> Series:
    """Draw a curve with its interval, and a marker at its end."""
    style, y = band.style, _shown(band.y)
    axis.fill_between(band.x, _shown(band.low), _shown(band.high), color=style.colour, alpha=0.16, linewidth=0)
    axis.plot(band.x, y, color=style.colour, linewidth=2.0)
    axis.plot(band.x[-1:], y[-1:], style.marker, color=style.colour, markersize=4.5)
    return Series(style, band.x, y)


def _positive(axis: "matplotlib.axes.Axes", values: list[Array]) -> None:
    """Set a logarithmic axis if all values are positive and span a range."""
    finite = np.concatenate([y[np.isfinite(y)] for y in values])
    if finite.size and finite.min() > 0 and finite.max() > 3 * finite.min():
        figures.log_axis(axis.yaxis, (float(finite.min()), float(finite.max())))


def _at(agent: AgentCurve, steps: Array) -> Array:
    """Return the seconds of learning at each number of real steps."""
    return agent.seconds[np.searchsorted(agent.steps, steps)]


def _few(values: Array) -> Array:
    """Return the indices of at most `POINTS` values at even distances, with the first and the last."""
    return np.unique(np.linspace(0, len(values) - 1, min(POINTS, len(values))).astype(int))


def _shown(y: Array) -> Array:
    return np.where(np.isfinite(y), y, np.nan)
