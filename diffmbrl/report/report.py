"""`report.html`: one file that says what a run found, shows it, and tells how to repeat it. No script, no outside resource."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from diffmbrl.render import page
from diffmbrl.render.page import cell, escape, prose
from diffmbrl.report import (
    arms,
    frame,
    gallery,
    health_report,
    learn_report,
    plan_report,
    sweep_report,
    table,
    verdict,
    words,
)
from diffmbrl.report.table import MethodSummary, Summary
from diffmbrl.runs import metrics
from diffmbrl.runs.folder import write_atomic
from diffmbrl.runs.statistics import Estimate


def summarise(folder: Path) -> Summary:
    """The summary of a run, from its metrics: `table.text` prints it, `verdict.sentences` says what it means."""
    return table.summarise(arms.collect_arms(metrics.read_metrics(folder / "metrics.jsonl")[0]))


def plan_text(folder: Path) -> str:
    """The table of a planning run, for the terminal."""
    return plan_report.text(_json(folder / "config.json"), metrics.read_metrics(folder / "metrics.jsonl")[0])


def health_text(folder: Path) -> str:
    """The verdict of a diagnosis and its table, for the terminal."""
    return health_report.text(_json(folder / "config.json"), metrics.read_metrics(folder / "metrics.jsonl")[0])


def learn_text(folder: Path) -> str:
    """The table of agents that learned, and what it says, for the terminal."""
    return learn_report.text(metrics.read_metrics(folder / "metrics.jsonl")[0])


def sweep_text(folder: Path) -> str:
    """The table of a sweep, for the terminal."""
    return sweep_report.text(_json(folder / "config.json"), metrics.read_metrics(folder / "metrics.jsonl")[0])


def rebuild(folder: Path) -> Path:
    """Draws `figures/` and writes `report.html` from config.json, provenance.json and metrics.jsonl alone; returns its path.

    The same data give the same bytes.
    Raises: `ValueError`, one line, if `folder` is not a run or its files cannot be read.

    >>> rebuild(Path("runs/cartpole-balance-compare-1b2c3d4e"))  # doctest: +SKIP
    PosixPath('runs/cartpole-balance-compare-1b2c3d4e/report.html')
    """
    folder = Path(folder)
    for needed in ("config.json", "metrics.jsonl"):
        if not (folder / needed).is_file():
            raise ValueError(f"{str(folder)!r} is not a run: it has no {needed}")
    config, provenance = _json(folder / "config.json"), {}
    records, damage = metrics.read_metrics(folder / "metrics.jsonl")
    remarks = [damage] if damage else []
    if (folder / "provenance.json").is_file():
        provenance = _json(folder / "provenance.json")
    else:
        remarks.append("provenance.json is missing: what this ran on is not known.")
    remarks += [str(record.get("text", "")) for record in records if record.get("kind") == "note"]
    remarks += [
        f"When the run was resumed: {remark}." for entry in frame.resumed(provenance) for remark in entry["remarks"]
    ]
    path = folder / "report.html"
    try:
        write_atomic(path, _composed(config, provenance, records, remarks, folder / "figures"))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{str(folder)!r} does not hold what a run of {config.get('job')!r} writes ({what})"
        ) from error
    return path


def _composed(
    config: dict[str, Any],
    provenance: dict[str, Any],
    records: list[dict[str, Any]],
    remarks: list[str],
    figures: Path,
) -> str:
    """The page of any job."""
    composers = {"plan": plan_report.compose, "diagnose": health_report.compose, "learn": learn_report.compose}
    composers["sweep"] = sweep_report.compose
    if compose_job := composers.get(str(config.get("job"))):
        return compose_job(config, provenance, records, remarks, figures)
    summary = table.summarise(arms.collect_arms(records))
    return compose_report(config, provenance, summary, gallery.comparison_figures(summary, figures), remarks)


def compose_report(
    config: dict[str, Any],
    provenance: dict[str, Any],
    summary: Summary,
    pictures: list[gallery.Picture],
    remarks: list[str],
) -> str:
    """The page."""
    task, job = str(config.get("task", "run")), str(config.get("job", "run"))
    parts = [frame.header(task, job, config, provenance), _verdict(summary)]
    if cautions := _cautions(summary, provenance, remarks):
        parts.append(f'<aside class="care">\n<h3>To bear in mind</h3>\n{page.items(cautions)}\n</aside>')
    if summary.rows:
        parts += ["<h2>Summary</h2>", _summary(summary, config)]
    for group in dict.fromkeys(picture.group for picture in pictures):
        shown = "\n".join(frame.figure(picture) for picture in pictures if picture.group == group)
        parts += [f"<h2>{escape(group)}</h2>", f'<div class="figures">\n{shown}\n</div>']
    if summary.arms:
        parts += ["<h2>Every arm</h2>", _every_arm(summary)]
    parts += ["<h2>To repeat it</h2>", frame.reproduce(config, provenance)]
    parts += ["<h2>Configuration and provenance</h2>", frame.facts(config, provenance)]
    return page.document(f"{task} \u00b7 {job}", "\n".join(parts))


def _verdict(summary: Summary) -> str:
    first, *rest = verdict.sentences(summary)
    return f'<p class="lead">{prose(first)}</p>\n' + (page.items(rest, kind="more") if rest else "")


def _cautions(summary: Summary, provenance: dict[str, Any], remarks: list[str]) -> list[str]:
    out = list(remarks)
    for row in summary.rows:
        ended = [reason for reason in row.arm.stops if "nonfinite" in reason or "non-finite" in reason]
        out += [f"{table.name(row.arm)} stopped: {reason}." for reason in ended]
        if row.measured and row.nonfinite > 0:
            met = f"{words.format_count(row.nonfinite)} non-finite {'value' if row.nonfinite == 1 else 'values'}"
            out.append(f"{table.name(row.arm)} met {met} in returns or gradients; those updates were rejected.")
        broken = int(np.nansum(row.arm["spread_nonfinite"])) if row.measured else 0
        if broken:
            out.append(
                f"{table.name(row.arm)}: at its evaluations {broken} gradients of single training starts were not finite."
            )
        if row.broken:
            out.append(
                f"{table.name(row.arm)} ends with a return that is not finite on {row.broken} of {row.arm.seeds} seeds: "
                "they count as minus infinity."
            )
        if not row.measured:
            reason = f" ({'; '.join(row.arm.stops)})" if row.arm.stops else ""
            out.append(f"{table.name(row.arm)} has no evaluation{reason}.")
        tried = [other.arm.rate for other in summary.arms if other.arm.method == row.arm.method and other.measured]
        rates = sorted(rate for rate in tried if rate is not None)
        if len(rates) > 2 and row.arm.rate in (rates[0], rates[-1]):
            side = "lowest" if row.arm.rate == rates[0] else "highest"
            out.append(
                f"{row.arm.label}'s best rate, {row.arm.rate:g}, is the {side} that was tried: a wider sweep may do better."
            )
    if (provenance.get("git") or {}).get("dirty"):
        out.append("The code had changes that are not in the commit.")
    return out


HEAD = """<thead>
<tr><th></th><th class="group start" colspan="4">Return</th><th class="group start" colspan="5">Work per seed</th>
<th class="group start" colspan="2">Time</th>
<th class="group start" colspan="3">To the best first-order return@target@</th></tr>
<tr><th>method</th><th class="start">training<br>starts</th><th>@count@held-out<br>starts</th>
<th>success</th><th>best<br>visited</th>
<th class="start">iterations</th><th>sequential<br>rollouts</th><th>forward</th><th>jvp</th><th>vjp</th>
<th class="start">wall-clock</th><th>compile</th>
<th class="start">time</th><th>sequential<br>rollouts</th><th>dynamics<br>evaluations</th></tr>
</thead>"""


def _summary(summary: Summary, config: dict[str, Any]) -> str:
    target = "" if math.isnan(summary.target) else f" ({words.format_number(summary.target)})"
    count = f"{config['held_out']} " if config.get("held_out") else ""
    head = HEAD.replace("@target@", prose(target)).replace("@count@", escape(count))
    body = "\n".join(_row(row, i, summary) for i, row in enumerate(summary.rows))
    notes = [
        "Return: interquartile mean over seeds, and below it the 95% bootstrap interval. Best visited: the held-out return at "
        "the evaluation where the training return was best, seed by seed. Work: mean over seeds of rollouts that ran one "
        "after another, and of dynamics steps, tangents (jvp) and cotangents (vjp). Time: all lanes together, without "
        "compiling and evaluating. Bold: the best policy in its column."
    ]
    if summary.reference is not None:
        notes[0] += (
            f" The best first-order return is the training return that {table.name(summary.reference)} ends with; "
            "a dash: not reached."
        )
    described = "".join(f'<p class="note">{prose(note)}</p>' for note in notes)
    return page.scroll("Summary of methods", f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>") + described


def _row(row: MethodSummary, index: int, summary: Summary) -> str:
    best = row is verdict.leader(summary), row is verdict.fastest(summary)
    arm, reach = row.arm, row.reach
    below = [f"rate {arm.rate:g}"] if arm.rate is not None else []
    below += ["plans each start anew"] if arm.plans else []
    below += [f"{arm.parameters:,} parameters"] if arm.parameters and not arm.plans else []
    lanes = f"{row.lanes:.0f} lanes" if row.measured and row.lanes > arm.seeds else ""
    cells = [
        f"<th>{_chip(index)}{escape(arm.label)}<small>{escape(', '.join(below))}</small></th>",
        _estimate(row.train, kind="start"),
        _estimate(row.test, kind="best" if best[0] else ""),
        cell(words.format_share(row.success)),
        _estimate(row.visited),
        cell(words.format_count(row.iterations), kind="start"),
        *(cell(words.format_count(x)) for x in (row.sequential, row.forward, row.jvp, row.vjp)),
        cell(words.seconds(row.seconds), below=lanes, kind="start"),
        cell(words.seconds(arm.compile_seconds)),
        cell(words.seconds(reach.seconds if reach else None), kind="start best" if best[1] else "start"),
        cell(words.format_count(reach.sequential if reach else None)),
        cell(words.format_count(reach.dynamics if reach else None)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _every_arm(summary: Summary) -> str:
    """The sweep: what the summary leaves out, and how each arm ended."""
    columns = ("training starts", "held-out starts", "success", "best visited", "iterations", "non-finite", "compile")
    head = "<tr><th>method</th><th>rate</th>" + "".join(f"<th>{name}</th>" for name in columns)
    head += '<th class="left start">continuation, discount \u00d7 updates</th><th class="left">ended by</th></tr>'
    methods = list(dict.fromkeys(row.arm.method for row in summary.rows))
    chosen = {id(row) for row in summary.rows}
    lines = []
    for row in summary.arms:
        arm = row.arm
        label = f"{_chip(methods.index(arm.method))}{escape(arm.label)}"
        stages = ", ".join(_stage(*stage) for stage in arm.continuation)
        cells = [
            f"<th>{label}</th>",
            cell("-" if arm.rate is None else f"{arm.rate:g}"),
            *(cell(words.format_value(e), below=words.format_interval(e)) for e in (row.train, row.test)),
            cell(words.format_share(row.success)),
            cell(words.format_value(row.visited), below=words.format_interval(row.visited)),
            cell(words.format_count(row.iterations)),
            cell(words.format_count(row.nonfinite)),
            cell(words.seconds(arm.compile_seconds)),
            cell(stages or "none", kind="left wrap start"),
            cell("; ".join(arm.stops) or "-", kind="left wrap"),
        ]
        lines.append(
            f"<tr{page.attribute('best' if id(row) in chosen and arm.rate is not None else '')}>{''.join(cells)}</tr>"
        )
    body = "\n".join(lines)
    note = '<p class="note">Bold: the rate that the summary shows, the one with the best training return.</p>'
    swept = any(row.arm.rate is not None for row in summary.arms)
    shown = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return page.scroll("Every arm", shown) + (note if swept else "")


def _stage(discount: float, updates: int, bound: float | None = None) -> str:
    return f"{discount:g} \u00d7 {updates:g}" + ("" if bound is None else f" (trust {bound:g})")


def _estimate(e: Estimate, *, kind: str = "") -> str:
    return cell(words.format_value(e), below=words.format_interval(e), kind=kind)


def _chip(index: int) -> str:
    return f'<span class="chip" style="background: var(--m{index % len(page.COLOURS)})"></span>'


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {str(path)!r}: it holds no object")
    return value
