"""The report of a planning run: a table of the starts, their trajectories, and animations."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from diffmbrl.render import palette
from diffmbrl.render.animated_gif import gif
from diffmbrl.render.html import animate
from diffmbrl.render.page import cell, escape
from diffmbrl.render.shapes import Circle, Line, Polygon, Rod, Shape
from diffmbrl.report import figures, gallery, skeleton, words
from diffmbrl.report.plans import plan_figure
from diffmbrl.report.skeleton import Contents, Record, RunData, of_kind
from diffmbrl.report.table import aligned

HEAD = ("start", "return", "in the model", "success", "iterations", "gradient norm", "non-finite", "ended by")
SHAPES = {"line": Line, "circle": Circle, "rod": Rod, "polygon": Polygon}
SHOWN = 12  # starts drawn and tabulated at most: the others are in the data


def contents(run: RunData) -> Contents:
    """Tabulate the starts and draw their figures and animations."""
    config, results = run.config, run.of_kind("result")
    bad = sum(r["nonfinite"] for r in results)
    cautions = [f"{words.format_count(bad)} non-finite values were met and rejected."] if bad else []
    if len(results) < int(config.get("starts", 0)):
        cautions.append(f"Only {len(results)} of {config['starts']} starts have ended.")
    tables = [("Each start", _table(results))] if results else []
    films = _films(run.records, run.figures)
    tables += [("The system moving", "\n".join(films))] if films else []
    pictures = _pictures(config, run.records, run.figures)
    return Contents([sentence(config, results)], cautions=cautions, tables=tables, pictures=pictures)


def sentence(config: Record, results: list[Record]) -> str:
    """State the result in one sentence."""
    if not results:
        return "No start has ended."
    earned = np.array([float(r["return"]) for r in results])
    who = f"{config['planner']} in the loop" if config.get("mpc") else f"{config['planner']}"
    line = f"{who} ends with a return of {words.format_number(float(np.median(earned)))}"
    line += f" (median of {len(earned)} starts)" if len(earned) > 1 else ""
    successes = [r["success"] for r in results if r["success"] is not None]
    if successes:
        line += f"; success on {sum(successes)} of {len(successes)}"
    model = [r["model_return"] for r in results if r["model_return"] is not None]
    if model and config.get("differs"):
        line += f". In its model the plan was worth {words.format_number(float(np.median(model)))}"
    return line + "."


def text(run: RunData) -> str:
    """Return the table for the terminal, then the sentence."""
    config, results = run.config, run.of_kind("result")
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
    lines = []
    for r in results[:SHOWN]:
        first, *rest, stop = _cells(r)
        cells = "".join(cell(x) for x in rest) + cell(stop, kind="left wrap")
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    note = (
        "Return: on the plant. In the model: the predicted return of the plan; a controller has none. Gradient norm: "
        "at the end, or a controller's median over its steps. Seconds: "
        + ", ".join(dict.fromkeys(words.seconds(r["seconds"]) for r in results[:SHOWN]))
        + f", compile {words.seconds(results[0]['compile_seconds'])}."
    )
    if len(results) > SHOWN:
        note += f" {len(results) - SHOWN} more starts are in metrics.jsonl."
    return skeleton.table("Each start", skeleton.columns(HEAD, left=HEAD[-1]), lines, note)


def _pictures(config: Record, records: list[Record], folder: Path) -> list[gallery.Picture]:
    """Draw the trajectories of all starts, and the return during the updates."""
    folder.mkdir(exist_ok=True)
    pictures = []
    runs, scenes = of_kind(records, "trajectory")[:SHOWN], of_kind(records, "scene")
    if runs and scenes:
        scene = scenes[0]
        gains = [run["gains"] for run in runs]
        K = None if any(g is None for g in gains) else np.asarray(gains, float)
        s, a = (np.asarray([run[name] for run in runs], float) for name in ("s", "a"))
        settings: Record = {name: scene[name] for name in ("state_names", "action_names", "dt")} | _limits(scene)

        def draw() -> Any:
            return plan_figure(s, a, K, **settings)

        caption = "States and actions on the plant, all starts overlaid; dashed: the limits of the actions."
        caption += "" if K is None else " The gain is that of the plan's feedback, in the units of the plot."
        pictures.append(gallery.save_figure(folder, "trajectory", "Figures", "The trajectory", caption, draw))
    updates = of_kind(records, "updates")[:SHOWN]
    if updates and max(len(u["J"]) for u in updates) > 1:
        axis_name = "time step" if config.get("mpc") else "updates"
        caption = (
            "The return of each window's plan, before the step's last update: it changes as the window moves."
            if config.get("mpc")
            else "Before each update, of the present objective: a schedule of growing horizons changes it."
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

        pictures.append(
            gallery.save_figure(folder, "returns", "Figures", "The return during the updates", caption, paint)
        )
    return pictures


def _films(records: list[Record], folder: Path) -> list[str]:
    """Animate each start whose frames were saved, for the page and as a GIF."""
    scenes = of_kind(records, "scene")
    films = []
    for record in of_kind(records, "frames"):
        frames = [[_shape(shape) for shape in shapes] for shapes in record["frames"]]
        [run] = [run for run in of_kind(records, "trajectory") if run["start"] == record["start"]]
        a = np.asarray(run["a"], float)[: len(frames) - 1]
        settings = {"dt": scenes[0]["dt"], "action_names": scenes[0]["action_names"]}
        settings |= _limits(scenes[0])
        films.append(animate(frames, a, title=f"start {record['start']}", **settings))
        folder.mkdir(exist_ok=True)
        gif(folder / f"animation-{record['start']}.gif", frames, a, title=f"start {record['start']}", **settings)
    return films


def _limits(scene: Record) -> dict[str, np.ndarray]:
    return {name: np.asarray(scene[name], float) for name in ("a_low", "a_high")}


def shape_record(shape: Shape) -> list[Any]:
    """Convert a shape to JSON; `_shape` is the inverse."""
    name = type(shape).__name__.lower()
    return [name, *(x if isinstance(x, str) else np.round(np.asarray(x, float), 4).tolist() for x in shape)]


def _shape(saved: list[Any]) -> Shape:
    kind, points, *fields = saved
    return SHAPES[kind](np.asarray(points, float), *fields)
