"""The summary of a comparison: one row for each method at its best rate, and its text for the terminal."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffmbrl.report import words
from diffmbrl.report.arms import Arm, best_rates
from diffmbrl.runs.statistics import Estimate, estimate, interquartile_mean

UNKNOWN = Estimate(math.nan, math.nan, math.nan)


class TargetReached(NamedTuple):
    """The work of an arm until its training return (interquartile mean) first reached the target."""

    update: float
    seconds: float
    sequential: float
    dynamics: float


@dataclass
class MethodSummary:
    """The row of a method. Work is the mean over seeds; seconds are of the whole arm, all replicas together."""

    arm: Arm
    train: Estimate
    test: Estimate
    visited: Estimate  # held-out return where the training return was best, seed by seed
    success: float
    iterations: float
    sequential: float
    forward: float
    jvp: float
    vjp: float
    seconds: float
    replicas: float
    nonfinite: float  # over all seeds
    reach: TargetReached | None

    @property
    def measured(self) -> bool:
        return self.arm.measured

    @property
    def broken(self) -> int:
        """Seeds whose final return, on either set of starts, is not finite."""
        if not self.measured:
            return 0
        held_out = np.zeros_like(self.arm["test"]) if np.isnan(self.arm["test"]).all() else self.arm["test"]
        return int(np.sum(~np.isfinite(self.arm["train"][-1] + held_out[-1])))


@dataclass
class Summary:
    """The table: a row for each method, all arms, and the best first-order arm, whose final return is the target."""

    rows: list[MethodSummary]
    arms: list[MethodSummary]
    reference: Arm | None

    @property
    def target(self) -> float:
        return math.nan if self.reference is None else self.reference.score


def summarise(arms: list[Arm]) -> Summary:
    """Summarise every arm, and each method at its best rate, against the best first-order training return."""
    first = [arm for arm in arms if arm.order == 1 and arm.measured and not arm.plans and math.isfinite(arm.score)]
    reference = max(first, key=lambda arm: arm.score, default=None)
    best = {id(arm) for arm in best_rates(arms)}
    rows = [row_of(arm, math.nan if reference is None else reference.score) for arm in arms]
    return Summary([row for row in rows if id(row.arm) in best], rows, reference)


def row_of(arm: Arm, target: float) -> MethodSummary:
    """Summarise one arm."""
    nan = math.nan
    if not arm.measured:
        return MethodSummary(arm, UNKNOWN, UNKNOWN, UNKNOWN, nan, nan, nan, nan, nan, nan, nan, nan, nan, None)
    train, test = arm["train"], arm["test"]
    peak = np.where(np.isfinite(train), train, -np.inf).argmax(axis=0)
    final = {name: float(np.mean(arm[name][-1])) for name in ("sequential", "forward", "jvp", "vjp")}
    success = arm["success"][-1]
    return MethodSummary(
        arm,
        train=estimate(train[-1]),
        test=UNKNOWN if np.isnan(test).all() else estimate(test[-1]),
        visited=UNKNOWN if np.isnan(test).all() else estimate(test[peak, np.arange(arm.seeds)]),
        success=nan if np.isnan(success).all() else float(np.nanmean(success)),
        iterations=float(arm["update"][-1]),
        seconds=float(arm["seconds"][-1]),
        replicas=float(arm["lanes"][-1]),
        nonfinite=float(np.nansum(arm["nonfinite"][-1])),
        reach=reach_of(arm, target),
        **final,
    )


def reach_of(arm: Arm, target: float) -> TargetReached | None:
    """Return the work until the first evaluation whose training return reaches the target, None if none does."""
    there = np.flatnonzero(interquartile_mean(arm["train"]) >= target)
    if there.size == 0:
        return None
    i = there[0]
    work = float(np.mean(arm["sequential"][i])), float(np.mean(arm.dynamics[i]))
    return TargetReached(float(arm["update"][i]), float(arm["seconds"][i]), *work)


def name(arm: Arm) -> str:
    """Return the label of an arm, with its rate if it has one."""
    return arm.label if arm.rate is None else f"{arm.label}, rate {arm.rate:g}"


def text(summary: Summary) -> str:
    """Format two tables for the terminal, quality and cost, at most about 110 columns wide, with their notes."""
    if not summary.rows:
        return "No arm was recorded."
    quality = [["method", "return on training starts", "on held-out starts", "success", "best visited"]]
    cost = [
        ["method", "iterations", "sequential", "forward", "jvp", "vjp", "wall-clock", "compile"]
        + ["reached in", "sequential", "evaluations"]
    ]
    for row in summary.rows:
        mark = "*" if row.arm.plans else ""
        estimates = [words.format_estimate(e) for e in (row.train, row.test, row.visited)]
        quality.append([name(row.arm) + mark, *estimates[:2], words.format_share(row.success), estimates[2]])
        work = [words.format_count(x) for x in (row.iterations, row.sequential, row.forward, row.jvp, row.vjp)]
        times = [words.seconds(row.seconds), words.seconds(row.arm.compile_seconds)]
        reach = row.reach
        last = (
            [words.seconds(reach.seconds), words.format_count(reach.sequential), words.format_count(reach.dynamics)]
            if reach
            else [words.NONE] * 3
        )
        cost.append([row.arm.label + mark, *work, *times, *last])
    notes = [
        "Return: interquartile mean over seeds [95% bootstrap interval]. Work: rollouts and dynamics steps per seed."
    ]
    if summary.reference is not None:
        target = f"{name(summary.reference)}, {words.format_number(summary.target)} on training starts"
        notes.append(f"Reached: the best first-order return ({target}).")
    if any(row.arm.plans for row in summary.rows):
        notes.append("* plans each start separately, instead of learning one policy for all.")
    return "\n\n".join([aligned(quality), aligned(cost), "\n".join(notes)])


def aligned(lines: list[list[str]]) -> str:
    """Align columns of text: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    first, *rest = widths
    out = [
        "  ".join([line[0].ljust(first), *(x.rjust(w) for x, w in zip(line[1:], rest, strict=True))]) for line in lines
    ]
    out.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(out)
