"""The report of a sweep: every point with its return, what each setting is worth, and the returns drawn against it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmbrl.render import page, palette
from diffmbrl.render.page import cell, escape, prose
from diffmbrl.report import figures, frame, gallery, words
from diffmbrl.report.plan_report import of_kind
from diffmbrl.report.plans import panels
from diffmbrl.report.table import UNKNOWN, aligned
from diffmbrl.runs.statistics import Estimate, estimate

Record = dict[str, Any]
SHOWN, PRINTED = 300, 20  # points of the page's table and the terminal's: the rest are in the data
COLUMNS = ("return", "training return", "success", "steps", "in", "state")
VALUES = 12  # of one setting, compared at most
NOTE = (
    "Return: on held-out starts or in evaluations, of planners on their own starts; interquartile mean over seeds [95% "
    "bootstrap interval]. Steps: updates, or real steps of each seed; the seconds are of all points that ran beside it."
)


class PointSummary(NamedTuple):
    """A point's summary."""

    name: str
    setting: Record  # what points differ in
    earned: np.ndarray  # [S]: on held-out starts or evaluations, or of planners the starts planned from
    final: Estimate
    train: Estimate
    success: float
    steps: float  # updates, or real steps
    seconds: float  # of its group
    nonfinite: float
    state: str
    commit: str | None


def compose(config: Record, provenance: Record, records: list[Record], remarks: list[str], folder: Path) -> str:
    """The page; draws `folder` on the way."""
    name, rows = str(config.get("name", "sweep")), ranked(records)
    first, *rest = sentences(config, rows)
    shown = {key: value for key, value in config.items() if key != "points"} | {"points": len(rows)}
    parts = [
        frame.header(name, f"sweep of {config.get('of')}", shown, provenance),
        f'<p class="lead">{prose(first)}</p>',
    ]
    parts += [page.items(rest, kind="more")] if rest else []
    if remarks := [*remarks, *_cautions(rows, provenance)]:
        parts.append(f'<aside class="care">\n<h3>To bear in mind</h3>\n{page.items(remarks)}\n</aside>')
    varied = [str(key) for key in config.get("varied", [])]
    if rows:
        parts += ["<h2>Every point</h2>", _table(rows, varied)]
    if effects := _effects(rows, varied):
        parts += ["<h2>Setting by setting</h2>", effects]
    if pictures := _draw(rows, varied, folder):
        parts += ["<h2>Returns</h2>", f'<div class="figures">\n{"".join(map(frame.figure, pictures))}\n</div>']
    parts += ["<h2>To repeat it</h2>", frame.reproduce(config, provenance)]
    parts += ["<h2>Configuration and provenance</h2>", frame.facts(shown, provenance)]
    return page.document(f"{name} \u00b7 sweep", "\n".join(parts))


def text(config: Record, records: list[Record]) -> str:
    """The table on the terminal, best first, with the sentences."""
    rows, varied = ranked(records), [str(key) for key in config.get("varied", [])]
    lines = [["", *varied, *COLUMNS], *([str(i + 1), *_cells(row, varied)] for i, row in enumerate(rows[:PRINTED]))]
    more = f"\n... and {len(rows) - PRINTED} more points, in the report" if len(rows) > PRINTED else ""
    return f"{aligned(lines)}{more}\n\n{NOTE}\n\n" + "\n".join(sentences(config, rows))


def ranked(records: list[Record]) -> list[PointSummary]:
    """The points, task by task, the highest return first and those without one last."""
    rows = [_row(record) for record in of_kind(records, "point")]
    order = {task: i for i, task in enumerate(dict.fromkeys(row.setting.get("task") for row in rows))}

    def key(row: PointSummary) -> tuple[int, bool, float]:
        return order[row.setting.get("task")], math.isnan(row.final.value), -row.final.value

    return sorted(rows, key=key)


def sentences(config: Record, rows: list[PointSummary]) -> list[str]:
    """What came out, the headline first."""
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
    """The numbers of the best point that nothing lies beyond; of those with at least three values tried."""
    out = []
    for name, value in best.setting.items():
        tried = sorted({row.setting[name] for row in rows if _is_number(row.setting.get(name))})
        if _is_number(value) and len(tried) > 2 and value in (tried[0], tried[-1]):
            out.append((name, "lowest" if value == tried[0] else "highest"))
    return out


def _cautions(rows: list[PointSummary], provenance: Record) -> list[str]:
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
    if (provenance.get("git") or {}).get("dirty"):
        out.append("The code had changes that are not in the commit.")
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
    names = ["", *varied, *COLUMNS[:4], "seconds of its group", "state"]
    head = "".join(f"<th{page.attribute('left' if name == 'state' else '')}>{escape(name)}</th>" for name in names)
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
    body = "\n".join(lines)
    shown = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return page.scroll("Every point", shown) + f'<p class="note">{prose(NOTE + more)}</p>'


def _effects(rows: list[PointSummary], varied: list[str]) -> str:
    """For each value of each setting: the best point that has it, and the interquartile mean over all of them."""
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
    # Returns of different tasks are no numbers to average.
    if not lines or "task" in varied:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("setting", "value", "points", "best point", "all points"))
    note = (
        "All points: interquartile mean over the seeds of all points with this value, and its 95% bootstrap interval."
    )
    body = "\n".join(lines)
    shown = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return page.scroll("Setting by setting", shown) + f'<p class="note">{note}</p>'


def _draw(rows: list[PointSummary], varied: list[str], folder: Path) -> list[gallery.Picture]:
    """Return against each setting, coloured by the first that is text."""
    drawn = [row for row in rows if row.earned.size and math.isfinite(row.final.value)]
    names = [name for name in varied if len({_value(row.setting.get(name)) for row in drawn}) > 1 and name != "task"]
    if not names:
        return []
    folder.mkdir(exist_ok=True)
    by = next((name for name in names if isinstance(drawn[0].setting.get(name), str)), None)
    names = [name for name in names if name != by] or names  # it is told by the colours
    out = []
    for task in dict.fromkeys(row.setting.get("task") for row in drawn):
        own = [row for row in drawn if row.setting.get("task") == task]
        title = "Return against each setting" + (f", {task}" if task else "")
        caption = "Cost is minus the return. " if all(row.final.value < 0 for row in own) else ""
        caption += "Interquartile mean over seeds and 95% bootstrap interval of each point; a line joins the best ones."
        file = "returns" if task is None else f"returns-{task}"
        out.append(gallery.save_figure(folder, file, "Returns", title, caption, _panels(own, names, by)))
    return out


def _panels(rows: list[PointSummary], names: list[str], by: str | None) -> Callable[[], Any]:
    def make() -> Any:
        figure, axes = panels(len(names), xlabel="") if len(names) > 1 else _alone()
        kinds = list(dict.fromkeys(_value(row.setting.get(by)) if by else "" for row in rows))
        looks = {kind: figures.style_of(kind, index=i) for i, kind in enumerate(kinds)}
        for axis, name in zip(axes, names, strict=True):
            axis.tick_params(labelbottom=True)
            axis.set_title(name, loc="left", fontsize=8.5, pad=4, parse_math=False)
            sign = figures.return_axis(axis, [row.earned for row in rows])
            axis.set_ylabel("return" if sign > 0 else "cost", fontsize=8.5)
            place = _places(axis, [row.setting.get(name) for row in rows])
            for kind, style in looks.items():
                own = [row for row in rows if not by or _value(row.setting.get(by)) == kind]
                _points(axis, own, [place(row.setting.get(name)) for row in own], sign, style)
        if len(looks) > 1:
            handles = [_handle(style) for style in looks.values()]
            axes[0].legend(
                handles=handles, loc="upper right", fontsize=7, labelcolor=palette.INK, frameon=True, framealpha=0.85
            )
        return figure

    return make


def _alone() -> tuple[Any, list[Any]]:
    figure, axis = figures.canvas()
    return figure, [axis]


def _points(axis: Any, rows: list[PointSummary], x: list[float], sign: float, style: figures.Style) -> None:
    for place, row in zip(x, rows, strict=True):
        ends = sorted(sign * end for end in (row.final.low, row.final.high))
        if all(map(math.isfinite, ends)):
            axis.vlines(place, *ends, color=style.colour, linewidth=1.0, alpha=0.35)
    y = [sign * row.final.value for row in rows]
    axis.plot(x, y, style.marker, color=style.colour, markersize=3.5, alpha=0.75)
    best: dict[float, float] = {}
    for place, value in zip(x, y, strict=True):
        best[place] = value if place not in best else (max if sign > 0 else min)(best[place], value)
    if len(best) < len(x) or len(best) < 12:
        line = sorted(best.items())
        axis.plot(*zip(*line, strict=True), color=style.colour, linewidth=1.2, alpha=0.9)


def _places(axis: Any, values: list[Any]) -> Callable[[Any], float]:
    """Where a value stands on the x axis: at itself, on a logarithmic axis if they span more than a decade, or in turn."""
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
    """A setting's value as it was written."""
    if isinstance(x, list):
        return "x".join(map(str, x))
    return f"{x:g}" if isinstance(x, float) else "-" if x is None else str(x)
