"""The report of a sweep: the return of every point, the effect of each setting, and the returns against it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffmbrl.render import palette
from diffmbrl.render.page import cell, escape
from diffmbrl.report import figures, gallery, skeleton, words
from diffmbrl.report.plans import panels
from diffmbrl.report.skeleton import Contents, Record, RunData, of_kind
from diffmbrl.report.table import UNKNOWN, aligned
from diffmbrl.runs.statistics import Estimate, estimate

if TYPE_CHECKING:
    import matplotlib.axes

SHOWN, PRINTED = 300, 20  # points in the tables of the page and the terminal: the others are in the data
COLUMNS = ("return", "training return", "success", "steps", "in", "state")
VALUES = 12  # values of one setting compared at most
NOTE = (
    "Return: on held-out starts or in evaluations; interquartile mean over seeds [95% bootstrap interval]. Steps: updates, or "
    "real steps of each seed; seconds: of all points that ran in the same program."
)


class PointSummary(NamedTuple):
    """The row of one point."""

    name: str
    setting: Record  # the varied settings
    earned: np.ndarray  # [S]: returns on held-out starts or evaluations; on training starts in runs without these
    final: Estimate
    train: Estimate
    success: float
    steps: float  # updates, or real steps
    seconds: float  # of all points that ran in the same program
    nonfinite: float
    state: str
    commit: str | None


def contents(run: RunData) -> Contents:
    """Rank the points and draw their returns."""
    rows, varied = ranked(run.records), [str(key) for key in run.config.get("varied", [])]
    tables = [("Every point", _table(rows, varied))] if rows else []
    if effects := _effects(rows, varied):
        tables.append(("Setting by setting", effects))
    return Contents(
        lead=sentences(rows),
        cautions=_cautions(rows),
        tables=tables,
        pictures=_draw(rows, varied, run.figures),
        heading=str(run.config.get("name", "sweep")),
        kind=f"sweep of {run.config.get('of')}",
        facts={key: value for key, value in run.config.items() if key != "points"} | {"points": len(rows)},
    )


def text(run: RunData) -> str:
    """Return the table for the terminal, best first, then the sentences."""
    rows, varied = ranked(run.records), [str(key) for key in run.config.get("varied", [])]
    lines = [["", *varied, *COLUMNS], *([str(i + 1), *_cells(row, varied)] for i, row in enumerate(rows[:PRINTED]))]
    more = f"\n... and {len(rows) - PRINTED} more points, in the report" if len(rows) > PRINTED else ""
    return f"{aligned(lines)}{more}\n\n{NOTE}\n\n" + "\n".join(sentences(rows))


def ranked(records: list[Record]) -> list[PointSummary]:
    """Sort the points by task, the highest return first and points without one last."""
    rows = [_row(record) for record in of_kind(records, "point")]
    order = {task: i for i, task in enumerate(dict.fromkeys(row.setting.get("task") for row in rows))}

    def key(row: PointSummary) -> tuple[int, bool, float]:
        return order[row.setting.get("task")], math.isnan(row.final.value), -row.final.value

    return sorted(rows, key=key)


def sentences(rows: list[PointSummary]) -> list[str]:
    """State the results in sentences, the headline first."""
    measured = [row for row in rows if not math.isnan(row.final.value)]
    if not measured:
        return ["No point has a return."]
    out = []
    for task in dict.fromkeys(row.setting.get("task") for row in measured):
        first, *others = [row for row in measured if row.setting.get("task") == task]
        where = f" on {task}" if task else ""
        best = f"Of {len(others) + 1} points{where} the best is {_told(first)}: {words.format_estimate(first.final)}."
        level = sum(row.final.high >= first.final.low for row in others)
        if others and level:
            best += f" The intervals of {level} {'other overlaps' if level == 1 else 'others overlap'} its own."
        elif others:
            best += f" Next is {_told(others[0])} with {words.format_estimate(others[0].final)}."
        out.append(best)
        edges = _edges(first, [first, *others])
        out += [f"Its {name} is the {side} that was tried: a wider sweep may do better." for name, side in edges]
    return out + words.few(min(len(row.earned) for row in measured))


def _told(row: PointSummary) -> str:
    return ", ".join(f"{key} {_value(x)}" for key, x in row.setting.items() if key != "task") or "the only one"


def _edges(best: PointSummary, rows: list[PointSummary]) -> list[tuple[str, str]]:
    """Return the settings of the best point at an edge of at least three tried values, and which edge."""
    out = []
    for name, value in best.setting.items():
        tried = sorted({row.setting[name] for row in rows if _is_number(row.setting.get(name))})
        if _is_number(value) and len(tried) > 2 and value in (tried[0], tried[-1]):
            out.append((name, "lowest" if value == tried[0] else "highest"))
    return out


def _cautions(rows: list[PointSummary]) -> list[str]:
    out = []
    for state in dict.fromkeys(row.state for row in rows if row.state != "finished"):
        count = sum(row.state == state for row in rows)
        out.append(f"{count} of {len(rows)} points: {state}. The same command runs them again.")
    if met := [row for row in rows if row.nonfinite > 0]:
        out.append(f"{len(met)} points met non-finite values in returns or gradients; those updates were rejected.")
    if broken := [row for row in rows if row.earned.size and not np.isfinite(row.earned).all()]:
        out.append(
            f"{len(broken)} points end with a return that is not finite on some seed: it counts as minus infinity."
        )
    if len(commits := {row.commit for row in rows if row.commit}) > 1:
        out.append(f"The points were run by {len(commits)} commits: {', '.join(sorted(c[:9] for c in commits))}.")
    problem = [name for name in rows[0].setting if name == "horizon" or name.startswith("param.")] if rows else []
    if problem:
        out.append(f"Points differ in {words.join_words(problem)}: returns of different problems, ranked together.")
    return out


def _row(record: Record) -> PointSummary:
    last, state = record.get("last") or {}, str(record.get("status", "missing"))
    if reason := record.get("reason"):
        state += f": {' '.join(str(reason).split())[:200]}"
    head, commit = (str(record.get("point")), record.get("setting") or {}), record.get("commit")
    if "train" not in last:
        nothing = np.zeros(0)
        return PointSummary(*head, nothing, UNKNOWN, UNKNOWN, math.nan, math.nan, math.nan, 0.0, state, commit)
    train = np.asarray(last["train"], float)
    earned = np.asarray(last.get("test", last["train"]), float)
    success = float(np.mean(last["success"])) if "success" in last else math.nan
    met = float(np.sum(last.get("nonfinite", 0)))
    trained = UNKNOWN if np.isnan(train).all() else estimate(train)
    return PointSummary(
        *head, earned, estimate(earned), trained, success, last["update"], last["seconds"], met, state, commit
    )


def _cells(row: PointSummary, varied: list[str]) -> list[str]:
    own = [_value(row.setting.get(key)) for key in varied]
    state = row.state.partition(":")[0]
    clock = words.seconds(row.seconds)
    return [
        *own,
        words.format_estimate(row.final),
        words.format_value(row.train),
        words.format_share(row.success),
        words.format_count(row.steps),
        clock,
        state,
    ]


def _table(rows: list[PointSummary], varied: list[str]) -> str:
    names = ["", *varied, *COLUMNS[:4], "seconds of its program", "state"]
    lines = []
    for i, row in enumerate(rows[:SHOWN]):
        own = "".join(cell(_value(row.setting.get(key))) for key in varied)
        final = cell(
            words.format_value(row.final), below=words.format_interval(row.final), kind="best" if i == 0 else ""
        )
        train = cell(words.format_value(row.train), below=words.format_interval(row.train))
        numbers = [words.format_share(row.success), words.format_count(row.steps), words.seconds(row.seconds)]
        cells = own + final + train + "".join(map(cell, numbers)) + cell(row.state, kind="left wrap")
        lines.append(f"<tr><th>{i + 1}<small>{escape(row.name)}</small></th>{cells}</tr>")
    more = f" {len(rows) - SHOWN} more points are in metrics.jsonl." if len(rows) > SHOWN else ""
    return skeleton.table("Every point", skeleton.columns(names, left="state"), lines, NOTE + more)


def _effects(rows: list[PointSummary], varied: list[str]) -> str:
    """Tabulate for each value of each setting the best point with it, and the mean over all points with it."""
    lines = []
    for name in varied:
        values = list(dict.fromkeys(_value(row.setting.get(name)) for row in rows))
        if not 1 < len(values) <= VALUES:
            continue
        for value in values:
            own = [row for row in rows if _value(row.setting.get(name)) == value and row.earned.size]
            if not own:
                continue
            best, pooled = own[0].final, estimate(np.concatenate([row.earned for row in own]))
            cells = (
                cell(value) + cell(str(len(own))) + cell(words.format_value(best), below=words.format_interval(best))
            )
            lines.append(
                f"<tr><th>{escape(name)}</th>{cells}"
                f"{cell(words.format_value(pooled), below=words.format_interval(pooled))}</tr>"
            )
    # Returns of different tasks must not be averaged.
    if not lines or "task" in varied:
        return ""
    head = skeleton.columns(("setting", "value", "points", "best point", "all points"))
    note = (
        "All points: interquartile mean over the seeds of all points with this value, and its 95% bootstrap interval."
    )
    return skeleton.table("Setting by setting", head, lines, note)


def _draw(rows: list[PointSummary], varied: list[str], folder: Path) -> list[gallery.Picture]:
    """Draw the return against each setting, coloured by the first setting with text values."""
    drawn = [row for row in rows if row.earned.size and math.isfinite(row.final.value)]
    names = [name for name in varied if len({_value(row.setting.get(name)) for row in drawn}) > 1 and name != "task"]
    if not names:
        return []
    folder.mkdir(exist_ok=True)
    by = next((name for name in names if isinstance(drawn[0].setting.get(name), str)), None)
    names = [name for name in names if name != by] or names  # the colours show it
    out = []
    for task in dict.fromkeys(row.setting.get("task") for row in drawn):
        own = [row for row in drawn if row.setting.get("task") == task]
        title = "Return against each setting" + (f", {task}" if task else "")
        caption = "Cost is minus the return. " if all(row.final.value < 0 for row in own) else ""
        caption += (
            "Interquartile mean over seeds and 95% bootstrap interval of each point; a line joins the best points."
        )
        file = "returns" if task is None else f"returns-{task}"
        out.append(gallery.save_figure(folder, file, "Returns", title, caption, _panels(own, names, by)))
    return out


def _panels(rows: list[PointSummary], names: list[str], by: str | None) -> Callable[[], Any]:
    def make() -> Any:
        figure, axes = panels(len(names), xlabel="") if len(names) > 1 else _alone()
        kinds = list(dict.fromkeys(_value(row.setting.get(by)) if by else "" for row in rows))
        styles = {kind: figures.style_of(kind, index=i) for i, kind in enumerate(kinds)}
        for axis, name in zip(axes, names, strict=True):
            axis.tick_params(labelbottom=True)
            axis.set_title(name, loc="left", fontsize=8.5, pad=4, parse_math=False)
            sign = figures.return_axis(axis, [row.earned for row in rows])
            axis.set_ylabel("return" if sign > 0 else "cost", fontsize=8.5)
            place = _places(axis, [row.setting.get(name) for row in rows])
            for kind, style in styles.items():
                own = [row for row in rows if not by or _value(row.setting.get(by)) == kind]
                _points(axis, own, [place(row.setting.get(name)) for row in own], sign, style)
        if len(styles) > 1:
            handles = [_handle(style) for style in styles.values()]
            axes[0].legend(
                handles=handles, loc="upper right", fontsize=7, labelcolor=palette.INK, frameon=True, framealpha=0.85
            )
        return figure

    return make


def _alone() -> tuple[Any, list[Any]]:
    figure, axis = figures.canvas()
    return figure, [axis]


def _points(
    axis: "matplotlib.axes.Axes", rows: list[PointSummary], x: list[float], sign: float, style: figures.Style
) -> None:
    for place, row in zip(x, rows, strict=True):
        ends = sorted(sign * end for end in (row.final.low, row.final.high))
        if all(map(math.isfinite, ends)):
            axis.vlines(place, ends[0], ends[1], color=style.colour, linewidth=1.0, alpha=0.35)
    y = [sign * row.final.value for row in rows]
    axis.plot(x, y, style.marker, color=style.colour, markersize=3.5, alpha=0.75)
    best: dict[float, float] = {}
    for place, value in zip(x, y, strict=True):
        best[place] = value if place not in best else (max if sign > 0 else min)(best[place], value)
    if len(best) < len(x) or len(best) < 12:
        line = sorted(best.items())
        axis.plot(*zip(*line, strict=True), color=style.colour, linewidth=1.2, alpha=0.9)


def _places(axis: "matplotlib.axes.Axes", values: list[Any]) -> Callable[[Any], float]:
    """Set up the x axis, logarithmic if the values span a decade; return the position of a value, its rank if it is text."""
    if all(map(_is_number, values)):
        low, high = min(values), max(values)
        if low > 0 and high / low >= 10:
            figures.log_axis(axis.xaxis, (float(low), float(high)))
        else:
            axis.xaxis.set_major_formatter(lambda x, _: figures.compact(round(x, 12)))
        return float
    names = list(dict.fromkeys(map(_value, values)))
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_xlim(-0.5, len(names) - 0.5)
    return lambda value: float(names.index(_value(value)))


def _handle(style: figures.Style) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style.colour, marker=style.marker, markersize=4, label=style.label)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _value(x: Any) -> str:
    """Format the value of a setting."""
    if isinstance(x, list):
        return "x".join(map(str, x))
    return f"{x:g}" if isinstance(x, float) else "-" if x is None else str(x)
