"""The report of a comparison: return, work and time of each method, and a table of all arms."""

import math

import numpy as np

from diffmbrl.render import page
from diffmbrl.render.page import cell, escape, prose
from diffmbrl.report import arms, gallery, skeleton, table, verdict, words
from diffmbrl.report.skeleton import Contents, Record, RunData
from diffmbrl.report.table import MethodSummary, Summary
from diffmbrl.runs.statistics import Estimate


def contents(run: RunData) -> Contents:
    """Summarise the run and draw its figures."""
    summary = summarise(run.records)
    return Contents(
        lead=verdict.sentences(summary),
        cautions=_cautions(summary),
        tables=[("Summary", _summary(summary, run.config))] if summary.rows else [],
        pictures=gallery.comparison_figures(summary, run.figures),
        appendix=[("Every arm", _every_arm(summary))] if summary.arms else [],
    )


def text(run: RunData) -> str:
    """Return the tables for the terminal, then the sentences."""
    summary = summarise(run.records)
    return f"{table.text(summary)}\n\n" + "\n".join(verdict.sentences(summary))


def summarise(records: list[Record]) -> Summary:
    """Return the summary of a comparison's records."""
    return table.summarise(arms.collect_arms(records))


def _cautions(summary: Summary) -> list[str]:
    out = []
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
    return out


HEAD = """
<tr><th></th><th class="group start" colspan="4">Return</th><th class="group start" colspan="5">Work per seed</th>
<th class="group start" colspan="2">Time</th>
<th class="group start" colspan="3">To the best first-order return@target@</th></tr>
<tr><th>method</th><th class="start">training<br>starts</th><th>@count@held-out<br>starts</th>
<th>success</th><th>best<br>visited</th>
<th class="start">iterations</th><th>sequential<br>rollouts</th><th>forward</th><th>jvp</th><th>vjp</th>
<th class="start">wall-clock</th><th>compile</th>
<th class="start">time</th><th>sequential<br>rollouts</th><th>dynamics<br>evaluations</th></tr>
"""


def _summary(summary: Summary, config: Record) -> str:
    target = "" if math.isnan(summary.target) else f" ({words.format_number(summary.target)})"
    count = f"{config['held_out']} " if config.get("held_out") else ""
    head = HEAD.replace("@target@", prose(target)).replace("@count@", escape(count))
    lines = [_row(row, i, summary) for i, row in enumerate(summary.rows)]
    note = (
        "Return: interquartile mean over seeds, and below it the 95% bootstrap interval. Best visited: the held-out return at "
        "the evaluation where the training return was best, seed by seed. Work: mean over seeds of rollouts that ran one "
        "after another, and of dynamics steps, tangents (jvp) and cotangents (vjp). Time: all replicas together, without "
        "compiling and evaluating. Bold: the best policy in its column."
    )
    if summary.reference is not None:
        note += (
            f" The best first-order return is the training return that {table.name(summary.reference)} ends with; "
            "a dash: not reached."
        )
    return skeleton.table("Summary of methods", head, lines, note)


def _row(row: MethodSummary, index: int, summary: Summary) -> str:
    best = row is verdict.leader(summary), row is verdict.fastest(summary)
    arm, reach = row.arm, row.reach
    below = [f"rate {arm.rate:g}"] if arm.rate is not None else []
    below += ["plans each start separately"] if arm.plans else []
    below += [f"{arm.parameters:,} parameters"] if arm.parameters and not arm.plans else []
    replicas = f"{row.replicas:.0f} replicas" if row.measured and row.replicas > arm.seeds else ""
    cells = [
        f"<th>{_chip(index)}{escape(arm.label)}<small>{escape(', '.join(below))}</small></th>",
        _estimate(row.train, kind="start"),
        _estimate(row.test, kind="best" if best[0] else ""),
        cell(words.format_share(row.success)),
        _estimate(row.visited),
        cell(words.format_count(row.iterations), kind="start"),
        *(cell(words.format_count(x)) for x in (row.sequential, row.forward, row.jvp, row.vjp)),
        cell(words.seconds(row.seconds), below=replicas, kind="start"),
        cell(words.seconds(arm.compile_seconds)),
        cell(words.seconds(reach.seconds if reach else None), kind="start best" if best[1] else "start"),
        cell(words.format_count(reach.sequential if reach else None)),
        cell(words.format_count(reach.dynamics if reach else None)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _every_arm(summary: Summary) -> str:
    """Tabulate all arms: every learning rate, and the reason why each ended."""
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
    swept = any(row.arm.rate is not None for row in summary.arms)
    note = "Bold: the rate that the summary shows, the one with the best training return." if swept else ""
    return skeleton.table("Every arm", head, lines, note)


def _stage(discount: float, updates: int, bound: float | None = None) -> str:
    return f"{discount:g} \u00d7 {updates:g}" + ("" if bound is None else f" (trust {bound:g})")


def _estimate(e: Estimate, *, kind: str = "") -> str:
    return cell(words.format_value(e), below=words.format_interval(e), kind=kind)


def _chip(index: int) -> str:
    return f'<span class="chip" style="background: var(--m{index % len(page.COLOURS)})"></span>'
