"""Learning curves: the records of each agent as arrays along its real steps, and their table."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffmbrl.report import words
from diffmbrl.report.table import UNKNOWN, aligned
from diffmbrl.runs.statistics import Estimate, estimate, interquartile_mean

Array = np.ndarray
WAY = 0.9  # share of the best agent's improvement that is the target
EARNED = ("return", "best", "real steps", "episodes", "target at", "after")
ELSE = ("model error", "disagreement", "rejected", "refused", "learning", "in total")


@dataclass
class AgentCurve:
    """The records of one agent. Arrays run over iterations (I) and seeds (S); seconds are cumulative, of all seeds together."""

    method: str
    label: str
    text: str = ""  # a description
    steps: Array = field(default_factory=lambda: np.zeros(0))  # [I], real steps of each seed
    seconds: Array = field(default_factory=lambda: np.zeros(0))  # [I], of updates and real steps
    wall: Array = field(default_factory=lambda: np.zeros(0))  # [I], of the whole run
    earned: Array = field(
        default_factory=lambda: np.zeros((0, 1))
    )  # [I, S], mean return of the episodes that ended; NaN where none did
    episodes: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], number of episodes that ended
    tested: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], mean return of an evaluation
    evaluated: Array = field(default_factory=lambda: np.zeros(0, bool))  # [I], whether there was an evaluation
    rejected: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], transitions
    refused: Array = field(default_factory=lambda: np.zeros((0, 1)))  # [I, S], updates
    metrics: dict[str, Array] = field(default_factory=dict)  # [I, S] each, the agent's own metrics; NaN where not given
    model_rollouts: dict[str, Any] | None = None
    nonfinite: list[str] = field(default_factory=list)  # names of the first non-finite values of each record
    stop: str = ""

    @property
    def seeds(self) -> int:
        return self.rejected.shape[1]

    @property
    def trained(self) -> tuple[Array, Float[Array, "k S"]]:
        """Real steps, and the mean return of each seed's latest episodes, once every seed has finished one."""
        latest = np.full(self.seeds, math.nan)
        rows = []
        for now, count in zip(self.earned, self.episodes, strict=True):
            latest = np.where(count > 0, now, latest)
            rows.append(np.where(count > 0, now, latest))
        began = np.cumsum(self.episodes, axis=0).min(axis=1, initial=np.inf) > 0 if rows else np.zeros(0, bool)
        return self.steps[began], np.asarray(rows).reshape(-1, self.seeds)[began]

    @property
    def curve(self) -> tuple[Array, Float[Array, "k S"]]:
        """Real steps and returns: of evaluations, or of the latest episodes if there were no evaluations."""
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
    """The row of one agent."""

    agent: AgentCurve
    final: Estimate
    best: float  # interquartile mean at the best point of the curve
    steps: float  # real steps of each seed
    episodes: float  # of each seed, on average
    there: tuple[float, float] | None  # real steps and seconds to `WAY` of the best agent's improvement
    metrics: dict[str, float]  # its last own metrics: interquartile means over seeds
    rejected: int
    refused: int


def collect_curves(records: list[dict[str, Any]]) -> list[AgentCurve]:
    """Collect the records of each agent, in the order in which they began."""
    agents: dict[str, AgentCurve] = {}
    lines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "method" not in record:
            continue
        name = str(record["method"])
        agent = agents.setdefault(name, AgentCurve(name, name))
        if record["kind"] == "agent":
            agent.label, agent.text = str(record.get("label", name)), str(record.get("text", ""))
        elif record["kind"] == "iteration":
            lines.setdefault(name, []).append(record)
        elif record["kind"] == "foresight":
            agent.model_rollouts = record
        elif record["kind"] == "stop":
            agent.stop = str(record.get("reason", ""))
    for name, rows in lines.items():
        _fill(agents[name], rows)
    return list(agents.values())


def summarise(agents: list[AgentCurve]) -> list[AgentSummary]:
    """Return one row for each agent."""
    goal = target(agents)
    return [_row(agent, goal) for agent in agents]


def leader(agents: list[AgentCurve]) -> AgentCurve | None:
    """Return the agent with the highest final return, None if no return was measured."""
    return max((c for c in agents if c.measured), key=lambda c: c.means[-1], default=None)


def target(agents: list[AgentCurve]) -> float:
    """Return the best agent's first return plus `WAY` of its improvement; NaN if it did not improve."""
    best = leader(agents)
    if best is None or not best.means[-1] > best.means[0] > -math.inf:
        return math.nan
    return float(best.means[0] + WAY * (best.means[-1] - best.means[0]))


def text(rows: list[AgentSummary]) -> str:
    """Format two tables for the terminal, returns and everything else, with their notes."""
    if not any(row.agent.measured for row in rows):
        return "No return was measured."
    lines = [["agent", *EARNED, *ELSE], *([row.agent.label, *cells(row)] for row in rows)]
    split = 1 + len(EARNED)
    tables = aligned([line[:split] for line in lines]), aligned([[line[0], *line[split:]] for line in lines])
    return "\n\n".join([*tables, note(rows)])


def cells(row: AgentSummary) -> list[str]:
    """Return the cells of an agent's row, without its name."""
    agent, metrics = row.agent, row.metrics
    there = [words.NONE] * 2 if row.there is None else [words.format_count(row.there[0]), words.seconds(row.there[1])]
    numbers = [words.format_number(metrics.get(name, math.nan)) for name in ("model_error", "disagreement")]
    times = [words.seconds(float(x[-1]) if x.size else None) for x in (agent.seconds, agent.wall)]
    head = [
        words.format_estimate(row.final),
        words.format_number(row.best),
        words.format_count(row.steps),
        words.format_count(row.episodes),
    ]
    return [*head, *there, *numbers, words.format_count(row.rejected), words.format_count(row.refused), *times]


def note(rows: list[AgentSummary]) -> str:
    """Explain the numbers of the table."""
    plain = [row.agent.label for row in rows if not row.agent.evaluated.any()]
    what = "of evaluations without exploration" if len(plain) < len(rows) else "of the latest episodes"
    what += f" ({words.join_words(plain)}: of its latest episodes)" if plain and len(plain) < len(rows) else ""
    goal = target([row.agent for row in rows])
    there = (
        ""
        if math.isnan(goal)
        else f" Target at, after (real steps, seconds): {words.format_number(goal)}, {WAY:.0%} of the best agent's improvement."
    )
    return (
        f"Return: {what}, interquartile mean over seeds [95% bootstrap interval]. Real steps and episodes: of each seed."
        f"{there} Learning: updates and steps of all seeds; in total: with compiling and evaluating."
    )


def _row(agent: AgentCurve, goal: float) -> AgentSummary:
    if not agent.steps.size:
        return AgentSummary(agent, UNKNOWN, math.nan, math.nan, math.nan, None, {}, 0, 0)
    counts = int(agent.rejected.sum()), int(agent.refused.sum())
    metrics = {name: float(interquartile_mean(x[~np.isnan(x).all(axis=1)][-1])) for name, x in agent.metrics.items()}
    steps, episodes = float(agent.steps[-1]), float(agent.episodes.sum() / agent.seeds)
    if not agent.measured:
        return AgentSummary(agent, UNKNOWN, math.nan, steps, episodes, None, metrics, *counts)
    (x, y), means = agent.curve, agent.means
    reached = np.flatnonzero(means >= goal)
    there = None
    if reached.size:
        there = float(x[reached[0]]), float(agent.seconds[np.searchsorted(agent.steps, x[reached[0]])])
    return AgentSummary(agent, estimate(y[-1]), float(means.max()), steps, episodes, there, metrics, *counts)


def _fill(agent: AgentCurve, rows: list[dict[str, Any]]) -> None:
    """Fill the arrays of an agent from the records of its iterations."""
    seeds = max(len(row["episodes"]) for row in rows)
    for name, key in (("steps", "real_steps"), ("seconds", "seconds"), ("wall", "wall")):
        setattr(agent, name, np.array([float(row.get(key, math.nan)) for row in rows]))
    agent.earned = np.array([[np.mean(J) if J else math.nan for J in row["episodes"]] for row in rows], float)
    agent.episodes = np.array([[len(J) for J in row["episodes"]] for row in rows], float)
    agent.evaluated = np.array(["evaluation" in row for row in rows])
    agent.tested = np.array([_seeds([np.mean(J) for J in row.get("evaluation", [])], seeds) for row in rows])
    agent.rejected, agent.refused = (
        np.array([_seeds(row.get(name, 0), seeds) for row in rows]) for name in ("rejected", "refused")
    )
    agent.nonfinite = [str(name) for row in rows for name in row.get("nonfinite_in", [])]
    names = dict.fromkeys(name for row in rows for name in row.get("said", {}))
    metrics = {name: np.array([_seeds(row.get("said", {}).get(name), seeds) for row in rows]) for name in names}
    agent.metrics = {name: x for name, x in metrics.items() if not np.isnan(x).all()}


def _seeds(value: Any, seeds: int) -> Array:
    """Return one number for each seed; NaN if unknown."""
    numbers = np.asarray(math.nan if value is None else value, float)
    return np.broadcast_to(numbers, (seeds,)) if numbers.shape in ((), (seeds,)) else np.full(seeds, math.nan)
