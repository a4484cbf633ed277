"""The report of learning agents: the return of each against its real steps, and the errors of its model."""

import math

import numpy as np

from diffmbrl.render import page
from diffmbrl.render.page import cell, escape
from diffmbrl.report import learn_figures, learning_curves, skeleton, words
from diffmbrl.report.learning_curves import AgentCurve, AgentSummary
from diffmbrl.report.skeleton import Contents, RunData

NAMED = 3  # non-finite values given by name


def contents(run: RunData) -> Contents:
    """Summarise the run and draw its figures."""
    found = learning_curves.collect_curves(run.records)
    rows = learning_curves.summarise(found)
    scene = (run.of_kind("scene") or [{}])[0]
    return Contents(
        lead=sentences(rows),
        cautions=_cautions(rows),
        tables=[("Summary", _table(rows))] if rows else [],
        pictures=learn_figures.learn_pictures(found, scene, run.figures) if rows else [],
    )


def text(run: RunData) -> str:
    """Return the table for the terminal, then the sentences."""
    rows = learning_curves.summarise(learning_curves.collect_curves(run.records))
    return f"{learning_curves.text(rows)}\n\n" + "\n".join(sentences(rows))


def sentences(rows: list[AgentSummary]) -> list[str]:
    """State the results in sentences, the headline first."""
    ranked = sorted((row for row in rows if row.agent.measured), key=lambda row: -row.final.value)
    if not ranked:
        return ["No return was measured: no episode has ended."]
    first, *others = ranked
    seeds = words.few(min(row.agent.seeds for row in ranked))
    after = f"after {words.format_count(first.steps)} real steps"
    if not others:
        lead = f"{first.agent.label} ends with a return of {words.format_estimate(first.final)} {after}"
        came = first.agent.means[0]
        lead += f"; it began with {words.format_number(float(came))}." if len(first.agent.means) > 1 else "."
        return [lead, *_steps(ranked), *_models(ranked), *seeds]
    lead = f"{first.agent.label} has the highest return, {words.format_estimate(first.final)} {after}."
    level = [row.agent.label for row in others if row.final.high >= first.final.low]
    if level:
        overlap = "interval of {} overlaps" if len(level) == 1 else "intervals of {} overlap"
        lead += f" The {overlap.format(words.join_words(level))} it: these seeds do not separate them."
    else:
        lead += f" Next is {others[0].agent.label} with {words.format_estimate(others[0].final)}."
    return [lead, *_steps(ranked), *_models(ranked), *seeds]


def _steps(ranked: list[AgentSummary]) -> list[str]:
    """Compare the real steps to the target."""
    goal = learning_curves.target([row.agent for row in ranked])
    arrived = [(row.there, row) for row in ranked if row.there is not None]
    if math.isnan(goal) or not arrived:
        return []
    (there, quickest), *_ = sorted(arrived, key=lambda pair: pair[0])
    got = f"{words.format_number(goal)}, {learning_curves.WAY:.0%} of the {'best ' if len(ranked) > 1 else ''}improvement,"
    out = f"{got} was reached"
    out += f" first by {quickest.agent.label}" if len(ranked) > 1 else ""
    out += f" after {words.format_count(there[0])} real steps and {words.seconds(there[1])} of learning"
    others = [f"{row.agent.label} {words.format_count(there[0])}" for there, row in arrived if row is not quickest]
    out += f" (real steps of others: {', '.join(others)})" if others else ""
    never = [row.agent.label for row in ranked if row.there is None]
    return [f"{out}{f'; not by {words.join_words(never)}' if never else ''}."]


def _models(ranked: list[AgentSummary]) -> list[str]:
    """State the errors of the models' rollouts."""
    out = []
    for row in ranked:
        if (found := row.agent.model_rollouts) is None:
            continue
        error = np.asarray(found["error"], float)
        going = np.flatnonzero(~np.isnan(error).any(axis=0))
        if going.size:
            ahead = list(dict.fromkeys((0, min(9, int(going[-1])), int(going[-1]))))
            errors = [f"{words.format_number(float(np.median(error[:, k])))} after {k + 1}" for k in ahead]
            out.append(
                f"Error of the rollouts of {row.agent.label}'s model, in standard deviations of the states: "
                f"{', '.join(errors)} {'step' if ahead == [0] else 'steps'}."
            )
    return out


def _cautions(rows: list[AgentSummary]) -> list[str]:
    out = []
    for row in rows:
        who = row.agent.label
        if row.agent.stop.startswith(("interrupted", "failed", "budget")):
            out.append(f"{who} ended early: {row.agent.stop}.")
        if row.rejected:
            met = f"{words.format_count(row.rejected)} {'transition' if row.rejected == 1 else 'transitions'}"
            out.append(f"{who}: {met} were not finite, or of episodes over before they began, and were dropped.")
        if row.refused:
            made = f"{words.format_count(row.refused)} {'update' if row.refused == 1 else 'updates'}"
            out.append(f"{who}: {made} were not finite and were refused; the agent did not change.")
        if found := row.agent.nonfinite:
            more = len(found) - NAMED
            listed = "; ".join(found[:NAMED]) + (
                f"; and {words.format_count(more)} more in metrics.jsonl" if more > 0 else ""
            )
            out.append(f"{who}: not finite: {listed}.")
        if row.agent.measured and (bad := _broken(row.agent)):
            out.append(
                f"{who} ends with a return that is not finite on {bad} of {row.agent.seeds} seeds: they count as minus "
                "infinity."
            )
        if not row.agent.measured:
            out.append(f"{who}: no return was measured{f' ({row.agent.stop})' if row.agent.stop else ''}.")
    return out


def _broken(agent: AgentCurve) -> int:
    return int(np.sum(~np.isfinite(agent.curve[1][-1])))


def _table(rows: list[AgentSummary]) -> str:
    names = ("agent", *learning_curves.EARNED, *learning_curves.ELSE, "ended by")
    lines = []
    best = learning_curves.leader([row.agent for row in rows])
    for i, row in enumerate(rows):
        _, *others = learning_curves.cells(row)
        chip = f'<span class="chip" style="background: var(--m{i % len(page.COLOURS)})"></span>'
        final = cell(
            words.format_value(row.final),
            below=words.format_interval(row.final),
            kind="best" if row.agent is best and len(rows) > 1 else "",
        )
        cells = final + "".join(cell(x) for x in others) + cell(row.agent.stop or "-", kind="left wrap")
        lines.append(f"<tr><th>{chip}{escape(row.agent.label)}<small>{escape(row.agent.text)}</small></th>{cells}</tr>")
    head = skeleton.columns(names, left=names[-1])
    return skeleton.table("Summary of agents", head, lines, learning_curves.note(rows))
