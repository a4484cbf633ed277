"""The results of a comparison in sentences, computed from its summary alone."""

import math

from diffmbrl.report import words
from diffmbrl.report.table import MethodSummary, Summary, name

OVERFIT = 1.5  # a held-out cost above this multiple of the training cost counts as overfitting


def sentences(summary: Summary) -> list[str]:
    """State the results: the headline, then speed, sequential depth, planners, overfitting and few seeds."""
    policies = [row for row in summary.rows if row.measured and not row.arm.plans]
    if not policies:
        return ["No policy was evaluated, so there is nothing to compare.", *_planners(summary, policies)]
    parts = [_best(policies), *_fastest(summary, policies), *_planners(summary, policies)]
    return parts + _overfitting(policies) + words.few(min(row.arm.seeds for row in policies))


def leader(summary: Summary) -> MethodSummary | None:
    """Return the policy with the best held-out return."""
    rows = [row for row in summary.rows if row.measured and not row.arm.plans and not math.isnan(row.test.value)]
    return max(rows, key=lambda row: row.test.value, default=None)


def fastest(summary: Summary) -> MethodSummary | None:
    """Return the policy method that reached the best first-order return in the least time."""
    rows = [(row.reach.seconds, row) for row in summary.rows if row.reach is not None and not row.arm.plans]
    return min(rows, key=lambda pair: pair[0], default=(0.0, None))[1]


def _best(policies: list[MethodSummary]) -> str:
    ranked = sorted((row for row in policies if not math.isnan(row.test.value)), key=lambda row: -row.test.value)
    if not ranked:
        return "No held-out return was measured."
    first = ranked[0]
    success = (
        "" if math.isnan(first.success) else f", with {words.format_share(first.success)} of those starts a success"
    )
    lead = f"{name(first.arm)} has the best held-out return: {words.format_estimate(first.test)}{success}."
    if len(ranked) == 1:
        return lead
    level = [row.arm.label for row in ranked[1:] if row.test.high >= first.test.low]
    second = ranked[1]
    if level:
        overlap = "interval of {} overlaps" if len(level) == 1 else "intervals of {} overlap"
        return f"{lead} The {overlap.format(words.join_words(level))} it, so these seeds do not separate them."
    if math.isnan(first.test.low):
        return f"{lead} Next is {second.arm.label} with {words.format_estimate(second.test)}."
    return f"{lead} No other interval reaches it; next is {second.arm.label} with {words.format_estimate(second.test)}."


def _fastest(summary: Summary, policies: list[MethodSummary]) -> list[str]:
    reference, quickest = summary.reference, fastest(summary)
    if reference is None or quickest is None or quickest.reach is None:
        return ["No first-order method was evaluated, so there is no target return."]
    others = {row.arm.method: row for row in policies}
    own = others[reference.method]
    goal = f"the best first-order return ({words.format_number(summary.target)} on training starts, {name(reference)})"
    if quickest.arm.method == reference.method:
        goal = f"the best first-order return, its own {words.format_number(summary.target)} on training starts"
    out = [f"{quickest.arm.label} is the first to reach {goal}: {_spent(quickest)}."]
    rivals = [row for row in policies if row.reach is not None and row is not quickest]
    if rivals:
        rival = (
            own if quickest is not own else min(rivals, key=lambda row: row.reach.seconds if row.reach else math.inf)
        )
        out[0] = out[0][:-1] + f", against {_spent(rival)} for {rival.arm.label}."
    failed = [row.arm.label for row in policies if row.reach is None]
    if failed:
        out.append(f"{words.join_words(failed)} did not reach it.")
    return out + _depth(policies)


def _spent(row: MethodSummary) -> str:
    reach = row.reach
    return (
        f"{words.seconds(reach.seconds)} and {words.format_count(reach.dynamics)} dynamics evaluations"
        if reach
        else "nothing"
    )


def _depth(policies: list[MethodSummary]) -> list[str]:
    """Compare sequential rollouts: the time that remains on a machine that runs everything else in parallel."""
    ranked = sorted(
        ((row.reach.sequential, row) for row in policies if row.reach is not None and row.reach.sequential > 0),
        key=lambda pair: pair[0],
    )
    if len(ranked) < 2:
        return []
    (low, first), (high, last) = ranked[0], ranked[-1]
    return [
        f"{first.arm.label} needed the fewest sequential rollouts, which count on an accelerator: "
        f"{words.format_count(low)}, {words.times(high / low)} fewer than "
        f"{last.arm.label} ({words.format_count(high)})."
    ]


def _planners(summary: Summary, policies: list[MethodSummary]) -> list[str]:
    out = []
    for row in summary.rows:
        if row.measured and row.arm.plans and not math.isnan(row.test.value):
            best = max((p.test.value for p in policies if not math.isnan(p.test.value)), default=-math.inf)
            sense = "above every policy" if row.test.value > best else "below the best policy"
            tail = "" if best == -math.inf else f": {sense}"
            out.append(
                f"For reference, {row.arm.label}, which plans each start separately and learns no policy, gets "
                f"{words.format_estimate(row.test)} on the held-out starts{tail}."
            )
    return out


def _overfitting(policies: list[MethodSummary]) -> list[str]:
    out = []
    for row in policies:
        train, test = row.train.value, row.test.value
        if test < OVERFIT * train < 0:
            out.append(
                f"{row.arm.label} overfits its training starts: {words.format_number(train)} there, "
                f"{words.format_number(test)} on the "
                f"held-out ones ({words.format_number(row.visited.value)} where its training return was best)."
            )
    return out
