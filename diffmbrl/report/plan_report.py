"""The report of a planning run: what each start ended with, its trajectory, and the system moving."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmbrl.render import page, palette
from diffmbrl.render.animated_gif import gif
from diffmbrl.render.html import animate
from diffmbrl.render.page import cell, escape, prose
from diffmbrl.render.shapes import Circle, Line, Polygon, Rod
from diffmbrl.report import figures, frame, gallery, words
from diffmbrl.report.plans import plan_figure
from diffmbrl.report.table import aligned

Record = dict[str, Any]
HEAD = ("start", "return", "in the model", "success", "iterations", "gradient norm", "non-finite", "ended by")
SHAPES = {"line": Line, "circle": Circle, "rod": Rod, "polygon": Polygon}
SHOWN = 12  # starts drawn and tabled at most: the rest are in the data


def compose(config: Record, provenance: Record, records: list[Record], remarks: list[str], folder: Path) -> str:
    """The page; draws `folder` on the way."""
    task, job = str(config.get("task", "run")), str(config.get("job", "run"))
    results = of_kind(records, "result")
    parts = [frame.header(task, job, config, provenance), f'<p class="lead">{prose(sentence(config, results))}</p>']
    bad = sum(r["nonfinite"] for r in results)
    remarks = [*remarks, *([f"{words.format_count(bad)} non-finite values were met and rejected."] if bad else [])]
    if len(results) < int(config.get("starts", 0)):
        remarks.append(f"Only {len(results)} of {config['starts']} starts have ended.")
    if remarks:
        parts.append(f'<aside class="care">\n<h3>To bear in mind</h3>\n{page.items(remarks)}\n</aside>')
    if results:
        parts += ["<h2>Each start</h2>", _table(results)]
    films = _films(records, folder)
    if films:
        parts += ["<h2>The system moving</h2>", *films]
    pictures = _pictures(config, records, folder)
    if pictures:
        shown = "\n".join(frame.figure(picture) for picture in pictures)
        parts += ["<h2>Figures</h2>", f'<div class="figures">\n{shown}\n</div>']
    parts += ["<h2>To repeat it</h2>", frame.reproduce(config, provenance)]
    parts += ["<h2>Configuration and provenance</h2>", frame.facts(config, provenance)]
    return page.document(f"{task} \u00b7 {job}", "\n".join(parts))


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """The records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def sentence(config: Record, results: list[Record]) -> str:
    """What came out, in one."""
    if not results:
        return "No start has ended."
    earned = np.array([float(r["return"]) for r in results])
    who = f"{config['planner']} in the loop" if config.get("mpc") else f"{config['planner']}"
    said = f"{who} ends with a return of {words.format_number(float(np.median(earned)))}"
    said += f" (median of {len(earned)} starts)" if len(earned) > 1 else ""
    successes = [r["success"] for r in results if r["success"] is not None]
    if successes:
        said += f"; success on {sum(successes)} of {len(successes)}"
    model = [r["model_return"] for r in results if r["model_return"] is not None]
    if model and config.get("differs"):
        said += f". In its model the plan was worth {words.format_number(float(np.median(model)))}"
    return said + "."


def text(config: Record, records: list[Record]) -> str:
    """The table on the terminal, with the sentence."""
    results = of_kind(records, "result")
    if not results:
        return "No start has ended."
    lines = [list(HEAD), *(_cells(r) for r in results[:SHOWN])]
    more = f"\n... and {len(results) - SHOWN} more starts" if len(results) > SHOWN else ""
    last = results[-1]
    if config.get("mpc"):
        steps = int(config["steps"]) * len(results)
        times = f"{words.seconds(last['seconds'])}, {1e3 * last['seconds'] / steps:.2f} ms a step"
    else:
        times = f"{words.seconds(sum(r['seconds'] for r in results))} for all starts"
    compiled = words.seconds(results[0]["compile_seconds"])
    return f"{aligned(lines)}{more}\n\n{times}; compile {compiled}\n{sentence(config, results)}"


def _cells(r: Record) -> list[str]:
    success = {None: words.NONE, True: "yes", False: "no"}[r["success"]]
    counts = [words.format_count(r["iterations"]), _norm(r["gradient_norm"]), words.format_count(r["nonfinite"])]
    return [
        str(r["start"]),
        words.format_number(r["return"]),
        words.format_number(r["model_return"]),
        success,
        *counts,
        r["stop"],
    ]


def _norm(x: float | None) -> str:
    return words.NONE if x is None or math.isnan(x) else f"{x:.1e}"


def _table(results: list[Record]) -> str:
    head = "".join(f"<th{page.attribute('left' if n == HEAD[-1] else '')}>{escape(n)}</th>" for n in HEAD)
    lines = []
    for r in results[:SHOWN]:
        first, *rest, stop = _cells(r)
        cells = "".join(cell(x) for x in rest) + cell(stop, kind="left wrap")
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    note = (
        "Return: on the plant. In the model: what the plan promises there; a controller makes no such promise. Gradient norm: "
        "at the end, or a controller's median over its steps. Seconds: "
        + ", ".join(dict.fromkeys(words.seconds(r["seconds"]) for r in results[:SHOWN]))
        + f", compile {words.seconds(results[0]['compile_seconds'])}."
    )
    if len(results) > SHOWN:
        note += f" {len(results) - SHOWN} more starts are in metrics.jsonl."
    body = "\n".join(lines)
    shown = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return page.scroll("Each start", shown) + f'<p class="note">{prose(note)}</p>'


def _pictures(config: Record, records: list[Record], folder: Path) -> list[gallery.Picture]:
    """Trajectories of all starts over one another, and how the returns came about."""
    folder.mkdir(exist_ok=True)
    pictures = []
    runs, scenes = of_kind(records, "trajectory")[:SHOWN], of_kind(records, "scene")
    if runs and scenes:
        scene = scenes[0]
        gains = [run["gains"] for run in runs]
        K = None if any(g is None for g in gains) else np.asarray(gains, float)
        s, a = (np.asarray([run[name] for run in runs], float) for name in ("s", "a"))
        looks: Record = {name: scene[name] for name in ("state_names", "action_names", "dt")} | _limits(scene)

        def draw() -> Any:
            return plan_figure(s, a, K, **looks)

        caption = "States and actions on the plant, all starts over one another; dashed, the limits of the actions."
        caption += "" if K is None else " The gain is that of the plan's feedback, in the units of the plot."
        pictures.append(gallery.save_figure(folder, "trajectory", "Figures", "The trajectory", caption, draw))
    updates = of_kind(records, "updates")[:SHOWN]
    if updates and max(len(u["J"]) for u in updates) > 1:
        axis_name = "time step" if config.get("mpc") else "updates"
        caption = (
            "The return of each window's plan, before the step's last update: it changes as the window moves."
            if config.get("mpc")
            else "Before each update, of the objective in force: a schedule of growing horizons changes it on the way."
        )

        def paint() -> Any:
            figure, axis = figures.canvas()
            curves = [np.asarray(u["J"], float) for u in updates]
            sign = figures.return_axis(axis, curves)
            axis.set_xlabel(axis_name)
            for curve in curves:
                y = np.where(np.isfinite(curve), sign * curve, np.nan)
                axis.plot(np.arange(len(y)), y, color=palette.PALETTE[0], linewidth=1.3, alpha=0.7)
            return figure

        pictures.append(gallery.save_figure(folder, "returns", "Figures", "The return on the way", caption, paint))
    return pictures


def _films(records: list[Record], folder: Path) -> list[str]:
    """The animation, in the page and as a GIF, of each start whose frames were kept."""
    scenes = of_kind(records, "scene")
    films = []
    for record in of_kind(records, "frames"):
        frames = [[_shape(shape) for shape in shapes] for shapes in record["frames"]]
        [run] = [run for run in of_kind(records, "trajectory") if run["start"] == record["start"]]
        a = np.asarray(run["a"], float)[: len(frames) - 1]
        looks = {"dt": scenes[0]["dt"], "action_names": scenes[0]["action_names"]}
        looks |= _limits(scenes[0])
        films.append(animate(frames, a, title=f"start {record['start']}", **looks))
        folder.mkdir(exist_ok=True)
        gif(folder / f"animation-{record['start']}.gif", frames, a, title=f"start {record['start']}", **looks)
    return films


def _limits(scene: Record) -> dict[str, np.ndarray]:
    return {name: np.asarray(scene[name], float) for name in ("a_low", "a_high")}


def shape_record(shape: Any) -> list[Any]:
    """A shape as JSON; `_shape` is the inverse."""
    name = type(shape).__name__.lower()
    return [name, *(x if isinstance(x, str) else np.round(np.asarray(x, float), 4).tolist() for x in shape)]


def _shape(saved: list[Any]) -> Any:
    kind, points, *fields = saved
    return SHAPES[kind](np.asarray(points, float), *fields)
