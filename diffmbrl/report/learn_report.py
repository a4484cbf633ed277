"""The report of agents that learned from a real system: what each earned for its real steps, and what its model is worth."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from diffmbrl.render import page
from diffmbrl.render.page import cell, escape, prose
from diffmbrl.report import frame, learn_figures, words
from diffmbrl.report import learning_curves as courses
from diffmbrl.report.learning_curves import AgentCurve, AgentSummary
from diffmbrl.report.plan_report import of_kind

Record = dict[str, Any]
NAMED = 3  # values that were not finite, by name


def compose(config: Record, provenance: Record, records: list[Record], remarks: list[str], folder: Path) -> str:
    """The page; draws `folder` on the way."""
    task, job = str(config.get("task", "run")), str(config.get("job", "run"))
    found = courses.collect_curves(records)
    rows = courses.summarise(found)
    first, *rest = sentences(rows)
    parts = [frame.header(task, job, config, provenance), f'<p class="lead">{prose(first)}</p>']
    parts += [page.items(rest, kind="more")] if rest else []
    if remarks := [*remarks, *_cautions(rows, provenance)]:
        parts.append(f'<aside class="care">\n<h3>To bear in mind</h3>\n{page.items(remarks)}\n</aside>')
    if rows:
        parts += ["<h2>Summary</h2>", _table(rows)]
        scene = (of_kind(records, "scene") or [{}])[0]
        pictures = learn_figures.learn_pictures(found, scene, folder)
        for group in dict.fromkeys(picture.group for picture in pictures):
            shown = "\n".join(frame.figure(picture) for picture in pictures if picture.group == group)
            parts += [f"<h2>{escape(group)}</h2>", f'<div class="figures">\n{shown}\n</div>']
    parts += ["<h2>To repeat it</h2>", frame.reproduce(config, provenance)]
    parts += ["<h2>Configuration and provenance</h2>", frame.facts(config, provenance)]
    return page.document(f"{task} \u00b7 {job}", "\n".join(parts))


def text(records: list[Record]) -> str:
    """The table on the terminal, with the sentences."""
    rows = courses.summarise(courses.collect_curves(records))
    return f"{courses.text(rows)}\n\n" + "\n".join(sentences(rows))


def sentences(rows: list[AgentSummary]) -> list[str]:
    """What came out, the headline first."""
    ranked = sorted((row for row in rows if row.course.measured), key=lambda row: -row.final.value)
    if not ranked:
        return ["No return was measured: no episode has ended."]
    first, *others = ranked
    seeds = words.few(min(row.course.seeds for row in ranked))
    after = f"after {words.format_count(first.steps)} real steps"
    if not others:
        lead = f"{first.course.label} ends with a return of {words.format_estimate(first.final)} {after}"
        came = first.course.means[0]
        lead += f"; it began with {words.format_number(float(came))}." if len(first.course.means) > 1 else "."
        return [lead, *_steps(ranked), *_models(ranked), *seeds]
    lead = f"{first.course.label} has the highest return, {words.format_estimate(first.final)} {after}."
    level = [row.course.label for row in others if row.final.high >= first.final.low]
    if level:
        overlap = "interval of {} overlaps" if len(level) == 1 else "intervals of {} overlap"
        lead += f" The {overlap.format(words.join_words(level))} it: these seeds do not separate them."
    else:
        lead += f" Next is {others[0].course.label} with {words.format_estimate(others[0].final)}."
    return [lead, *_steps(ranked), *_models(ranked), *seeds]


def _steps(ranked: list[AgentSummary]) -> list[str]:
    """Who needed the fewest real steps."""
    goal = courses.target([row.course for row in ranked])
    arrived = [(row.there, row) for row in ranked if row.there is not None]
    if math.isnan(goal) or not arrived:
        return []
    (there, quickest), *_ = sorted(arrived, key=lambda pair: pair[0])
    got = f"{words.format_number(goal)}, {courses.WAY:.0%} of the {'best ' if len(ranked) > 1 else ''}improvement,"
    out = f"{got} was reached"
    out += f" first by {quickest.course.label}" if len(ranked) > 1 else ""
    out += f" after {words.format_count(there[0])} real steps and {words.seconds(there[1])} of learning"
    others = [f"{row.course.label} {words.format_count(there[0])}" for there, row in arrived if row is not quickest]
    out += f" (real steps of others: {', '.join(others)})" if others else ""
    never = [row.course.label for row in ranked if row.there is None]
    return [f"{out}{f'; not by {words.join_words(never)}' if never else ''}."]


def _models(ranked: list[AgentSummary]) -> list[str]:
    """How far a model's rollouts are from the truth."""
    out = []
    for row in ranked:
        if (found := row.course.foresight) is None:
            continue
        error = np.asarray(found["error"], float)
        going = np.flatnonzero(~np.isnan(error).any(axis=0))
        if going.size:
            ahead = list(dict.fromkeys((0, min(9, int(going[-1])), int(going[-1]))))
            said = [f"{words.format_number(float(np.median(error[:, k])))} after {k + 1}" for k in ahead]
            out.append(
                f"The rollouts of {row.course.label}'s model are from the truth, in standard deviations of the states: "
                f"{', '.join(said)} {'step' if ahead == [0] else 'steps'}."
            )
    return out


def _cautions(rows: list[AgentSummary], provenance: Record) -> list[str]:
    out = []
    for row in rows:
        who = row.course.label
        if row.course.stop.startswith(("interrupted", "failed", "budget")):
            out.append(f"{who} was ended: {row.course.stop}.")
        if row.rejected:
            met = f"{words.format_count(row.rejected)} {'transition' if row.rejected == 1 else 'transitions'}"
            out.append(f"{who}: {met} were not finite, or of episodes over before they began, and were not kept.")
        if row.refused:
            made = f"{words.format_count(row.refused)} {'update' if row.refused == 1 else 'updates'}"
            out.append(f"{who}: {made} came out not finite and were refused; the agent stayed as it was.")
        if found := row.course.nonfinite:
            more = len(found) - NAMED
            said = "; ".join(found[:NAMED]) + (
                f"; and {words.format_count(more)} more in metrics.jsonl" if more > 0 else ""
            )
            out.append(f"{who}: not finite: {said}.")
        if row.course.measured and (bad := _broken(row.course)):
            out.append(
                f"{who} ends with a return that is not finite on {bad} of {row.course.seeds} seeds: they count as minus "
                "infinity."
            )
        if not row.course.measured:
            out.append(f"{who}: no return was measured{f' ({row.course.stop})' if row.course.stop else ''}.")
    if (provenance.get("git") or {}).get("dirty"):
        out.append("The code had changes that are not in the commit.")
    return out


def _broken(course: AgentCurve) -> int:
    return int(np.sum(~np.isfinite(course.curve[1][-1])))


def _table(rows: list[AgentSummary]) -> str:
    names = ("agent", *courses.EARNED, *courses.ELSE, "ended by")
    head = "".join(f"<th{page.attribute('left' if n == names[-1] else '')}>{escape(n)}</th>" for n in names)
    lines = []
    best = courses.leader([row.course for row in rows])
    for i, row in enumerate(rows):
        _, *others = courses.cells(row)
        chip = f'<span class="chip" style="background: var(--m{i % len(page.COLOURS)})"></span>'
        final = cell(
            words.format_value(row.final),
            below=words.format_interval(row.final),
            kind="best" if row.course is best and len(rows) > 1 else "",
        )
        cells = final + "".join(cell(x) for x in others) + cell(row.course.stop or "-", kind="left wrap")
        lines.append(
            f"<tr><th>{chip}{escape(row.course.label)}<small>{escape(row.course.text)}</small></th>{cells}</tr>"
        )
    body = "\n".join(lines)
    shown = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return page.scroll("Summary of agents", shown) + f'<p class="note">{prose(courses.note(rows))}</p>'
