"""From the lines of `metrics.jsonl` to courses: what one agent measured along its real steps, as arrays; and their table."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffmbrl.report import words
from diffmbrl.report.table import UNKNOWN, aligned
from diffmbrl.runs.statistics import Estimate, estimate, interquartile_mean

Array = np.ndarray
WAY = 0.9  # of the best agent's improvement, at which agents are said to have got there
EARNED = ("return", "best", "real steps", "episodes", "got there in", "after")
ELSE = ("model error", "disagreement", "rejected", "refused", "learning", "in all")


@dataclass
class AgentCurve:
    """One agent. Arrays run over iterations (I) and seeds (S); seconds are cumulative, of all seeds together."""

    method: str
    label: str
    text: str = ""  # what it is
    steps: Array = field(default_factory=lambda: np.zeros(0))  # [I], real steps of each seed
    seconds: Array = field(default_factory=lambda: np.zeros(0))  # [I], of updates and steps
    wall: Array = field(default_factory=lambda: np.zeros(0))  # [I], of all
    earned: Array = field(
        default_factory=lambda: np.zeros((0, 1))
    )  # [I, S], mean of the episodes that ended; NaN where none
    episodes: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], how many did
    tested: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], mean of an evaluation
    evaluated: Array = field(default_factory=lambda: np.zeros(0, bool))  # [I], whether there was one
    rejected: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], transitions
    refused: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], updates
    said: dict[str, Array] = field(default_factory=dict)  # [I, S] each, NaN where it said nothing
    foresight: dict[str, Any] | None = None
    nonfinite: list[str] = field(default_factory=list)  # names of the first values that were not, of each record
    stop: str = ""

    @property
    def seeds(self) -> int:
        return self.rejected.shape[1]

    @property
    def trained(self) -> tuple[Array, Float[Array, "k S"]]:
        """Real steps, and the mean return of each seed's latest episodes, from where every seed has had one."""
        latest = np.full(self.seeds, math.nan)
        rows = []
        for now, count in zip(self.earned, self.episodes, strict=True):
            latest = np.where(count > 0, now, latest)
            rows.append(np.where(count > 0, now, latest))
        began = np.cumsum(self.episodes, axis=0).min(axis=1, initial=np.inf) > 0 if rows else np.zeros(0, bool)
        return self.steps[began], np.asarray(rows).reshape(-1, self.seeds)[began]

    @property
    def curve(self) -> tuple[Array, Float[Array, "k S"]]:
        """Real steps and returns: of its evaluations, or where there was none of its latest episodes."""
        return (self.steps[self.evaluated], self.tested[self.evaluated]) if self.evaluated.any() else self.trained

    @property
    def means(self) -> Float[Array, " k"]:
        """Interquartile means over seeds along the curve."""
        return interquartile_mean(self.curve[1])

    @property
    def measured(self) -> bool:
        """Whether any return was measured."""
        return self.curve[0].size > 0


class AgentSummary(NamedTuple):
    """An agent's summary."""

    course: AgentCurve
    final: Estimate
    best: float  # interquartile mean at the best point of the curve
    steps: float  # real steps of each seed
    episodes: float  # of each seed, on average
    there: tuple[float, float] | None  # real steps and seconds to `WAY` of the best agent's improvement
    said: dict[str, float]  # what it said last: interquartile means
    rejected: int
    refused: int


def collect_curves(records: list[dict[str, Any]]) -> list[AgentCurve]:
    """The courses in the order in which they began."""
    courses: dict[str, AgentCurve] = {}
    lines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "method" not in record:
            continue
        name = str(record["method"])
        course = courses.setdefault(name, AgentCurve(name, name))
        if record["kind"] == "agent":
            course.label, course.text = str(record.get("label", name)), str(record.get("text", ""))
        elif record["kind"] == "iteration":
            lines.setdefault(name, []).append(record)
        elif record["kind"] == "foresight":
            course.foresight = record
        elif record["kind"] == "stop":
            course.stop = str(record.get("reason", ""))
    for name, rows in lines.items():
        _fill(courses[name], rows)
    return list(courses.values())


def summarise(courses: list[AgentCurve]) -> list[AgentSummary]:
    """A row for each course."""
    goal = target(courses)
    return [_row(course, goal) for course in courses]


def leader(courses: list[AgentCurve]) -> AgentCurve | None:
    """The one with the highest final return."""
    return max((c for c in courses if c.measured), key=lambda c: c.means[-1], default=None)


def target(courses: list[AgentCurve]) -> float:
    """`WAY` of the way from the best agent's first return to its last; NaN where it did not improve."""
    best = leader(courses)
    if best is None or not best.means[-1] > best.means[0] > -math.inf:
        return math.nan
    return float(best.means[0] + WAY * (best.means[-1] - best.means[0]))


def text(rows: list[AgentSummary]) -> str:
    """Two tables for the terminal, what was earned and what else there is to know, with the notes that they need."""
    if not any(row.course.measured for row in rows):
        return "No return was measured."
    lines = [["agent", *EARNED, *ELSE], *([row.course.label, *cells(row)] for row in rows)]
    split = 1 + len(EARNED)
    tables = aligned([line[:split] for line in lines]), aligned([[line[0], *line[split:]] for line in lines])
    return "\n\n".join([*tables, note(rows)])


def cells(row: AgentSummary) -> list[str]:
    """What the table says of an agent, beside its name."""
    course, said = row.course, row.said
    there = [words.NONE] * 2 if row.there is None else [words.format_count(row.there[0]), words.seconds(row.there[1])]
    numbers = [words.format_number(said.get(name, math.nan)) for name in ("model_error", "disagreement")]
    times = [words.seconds(float(x[-1]) if x.size else None) for x in (course.seconds, course.wall)]
    head = [
        words.format_estimate(row.final),
        words.format_number(row.best),
        words.format_count(row.steps),
        words.format_count(row.episodes),
    ]
    return [*head, *there, *numbers, words.format_count(row.rejected), words.format_count(row.refused), *times]


def note(rows: list[AgentSummary]) -> str:
    """What the numbers of the table are."""
    plain = [row.course.label for row in rows if not row.course.evaluated.any()]
    what = "of evaluations without exploration" if len(plain) < len(rows) else "of the latest episodes"
    what += f" ({words.join_words(plain)}: of its latest episodes)" if plain and len(plain) < len(rows) else ""
    goal = target([row.course for row in rows])
    there = (
        ""
        if math.isnan(goal)
        else f" Got there: {words.format_number(goal)}, {WAY:.0%} of the best agent's improvement."
    )
    return (
        f"Return: {what}, interquartile mean over seeds [95% bootstrap interval]. Real steps and episodes: of each seed."
        f"{there} Learning: updates and steps of all seeds; in all: compiling and evaluating too."
    )


def _row(course: AgentCurve, goal: float) -> AgentSummary:
    if not course.steps.size:
        return AgentSummary(course, UNKNOWN, math.nan, math.nan, math.nan, None, {}, 0, 0)
    counts = int(course.rejected.sum()), int(course.refused.sum())
    said = {name: float(interquartile_mean(x[~np.isnan(x).all(axis=1)][-1])) for name, x in course.said.items()}
    steps, episodes = float(course.steps[-1]), float(course.episodes.sum() / course.seeds)
    if not course.measured:
        return AgentSummary(course, UNKNOWN, math.nan, steps, episodes, None, said, *counts)
    (x, y), means = course.curve, course.means
    reached = np.flatnonzero(means >= goal)
    there = None
    if reached.size:
        there = float(x[reached[0]]), float(course.seconds[np.searchsorted(course.steps, x[reached[0]])])
    return AgentSummary(course, estimate(y[-1]), float(means.max()), steps, episodes, there, said, *counts)


def _fill(course: AgentCurve, rows: list[dict[str, Any]]) -> None:
    """The arrays of a course from the records of its iterations."""
    seeds = max(len(row["episodes"]) for row in rows)
    for name, key in (("steps", "real_steps"), ("seconds", "seconds"), ("wall", "wall")):
        setattr(course, name, np.array([float(row.get(key, math.nan)) for row in rows]))
    course.earned = np.array([[np.mean(J) if J else math.nan for J in row["episodes"]] for row in rows], float)
    course.episodes = np.array([[len(J) for J in row["episodes"]] for row in rows], float)
    course.evaluated = np.array(["evaluation" in row for row in rows])
    course.tested = np.array([_seeds([np.mean(J) for J in row.get("evaluation", [])], seeds) for row in rows])
    course.rejected, course.refused = (
        np.array([_seeds(row.get(name, 0), seeds) for row in rows]) for name in ("rejected", "refused")
    )
    course.nonfinite = [str(name) for row in rows for name in row.get("nonfinite_in", [])]
    names = dict.fromkeys(name for row in rows for name in row.get("said", {}))
    said = {name: np.array([_seeds(row.get("said", {}).get(name), seeds) for row in rows]) for name in names}
    course.said = {name: x for name, x in said.items() if not np.isnan(x).all()}


def _seeds(value: Any, seeds: int) -> Array:
    """A number for each seed; NaN where they are not known."""
    numbers = np.asarray(math.nan if value is None else value, float)
    return np.broadcast_to(numbers, (seeds,)) if numbers.shape in ((), (seeds,)) else np.full(seeds, math.nan)
