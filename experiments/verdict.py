r"""Which way of using a learned model earns the most, per real step and per second: to plan, to differentiate, to simulate?

Agents of `agents/registry.py` learn each task from nothing but real steps, all from the same first random ones, with several
seeds side by side. Returns are those of the true system, of what the agent would do without exploration, from starts that are
the same at each look and for all agents.

The score of a return is 0 at that of random actions and 1 at the best that any agent has reached on the task (the median over
seeds of its last look). CPU time is that of updates and real steps, without compiling and evaluating: the median of an
iteration's, times the number of iterations, so that what else the machine did meanwhile does not count; all seeds run in one
program, and share it.

None of the four tasks has an end. MBPO makes branches of 20 steps there, and 1000 updates between two fits; "long branches" are
those of 200 steps, and 3000 updates, which it makes by default where a fall ends them.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffmbrl.agents.learn import learn
from diffmbrl.agents.registry import AGENTS
from diffmbrl.agents.registry import make_agent as make_agent
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.tasks import make
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "MPC through the ensemble (1.5) needs the fewest real steps; Adam through its whole horizon (2.0) fails on the swing-ups, "
    "as the lecture says; in second order with a rising discount, or through short windows with a critic, 2.0 works; a model "
    "that simulates for a model-free learner works with more computation; without one SAC and PPO need many times the steps."
)


class Row(NamedTuple):
    """An agent of the registry, its options for so many iterations, and how many times the real steps of the others it gets."""

    agent: str
    options: Callable[[int], dict[str, Any]] = lambda iterations: {}
    more: int = 1


RANDOM = "random"
ROWS = {
    RANDOM: Row("random"),
    "2.0: Adam": Row("bptt"),
    "2.0: Newton, continued": Row("second-order", lambda iterations: {"continued": 4 * iterations}),
    "hybrid": Row("hybrid"),
    "2.0: short horizon": Row("short-horizon"),
    "1.5: MPC": Row("mpc"),
    "2.0: Adam, continued": Row("bptt", lambda iterations: {"continued": 30 * iterations}),
    "2.0: Newton": Row("second-order", lambda iterations: {"continued": 0}),
    "MBPO": Row("mbpo", lambda iterations: {"updates": 1000}),
    "PPO in the model": Row("model-ppo"),
    "SAC": Row("sac", more=5),
    "PPO": Row("ppo", more=25),
    "MBPO, long branches": Row("mbpo", lambda iterations: {"length": 200}),
}
EVERY = 200  # real steps of an iteration of the agents that this file sets up


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    real_steps: int
    seeds: int
    starts: int  # of each look; of agents that plan as they act no more than their row of the registry says, but two
    looks: int


FULL = Size(("pendulum", "cartpole-swingup", "cartpole-balance", "reacher"), tuple(ROWS), 2000, 5, 8, 5)
QUICK = Size(("pendulum",), (RANDOM, "2.0: Adam"), 600, 2, 4, 2)


def measure(size: Size, parts: Any):
    """One agent on one task after another; those whose row the registry does not have are left out."""
    numbers: dict[str, Any] = {}
    rows = [row for row in size.rows if ROWS[row].agent in AGENTS]
    for name in size.tasks:
        for row in rows:
            key = {"task": name, "row": row} | {k: getattr(size, k) for k in ("real_steps", "seeds", "starts", "looks")}
            run = parts(key, lambda name=name, row=row: _learn(name, ROWS[row], size))
            numbers.setdefault(name, {})[row] = run
            yield numbers


def _learn(name: str, row: Row, size: Size) -> dict[str, Any]:
    """Returns [looks, seeds] against real steps and seconds of CPU."""
    # Learning in single precision, as everywhere; diagnostics alone are in double.
    with jax.enable_x64(False):
        task, steps = make(name), row.more * size.real_steps
        agent = make_agent(row.agent, task, row.options(size.real_steps // EVERY - 1))
        keys = jax.random.split(jax.random.key(0), size.seeds)
        starts = min(size.starts, max(2, AGENTS[row.agent].evaluations))
        iterations = -(-(steps - agent.warmup) // agent.every)
        every = max(1, iterations // size.looks)
        clock = [time.process_time()]

        learned = learn(
            agent,
            task,
            keys,
            real_steps=steps,
            evaluations=starts,
            evaluate_every=every,
            on_record=lambda *_: clock.append(time.process_time()),
        )
    records = learned.records
    seconds = _per_iteration(np.diff(clock)[1:], ["evaluation" in record for record in records])
    looks = [i for i, record in enumerate(records) if "evaluation" in record]
    counted = ("rejected", "refused", "nonfinite")
    return {
        "steps": [records[i]["real_steps"] for i in looks],
        "seconds": [i * seconds for i in looks],
        "wall": [records[i]["seconds"] for i in looks],
        "starts": starts,
        "J": [np.mean(np.asarray(records[i]["evaluation"], float), axis=1) for i in looks],
    } | {what: int(sum(np.sum(record.get(what, 0)) for record in records)) for what in counted}


def _per_iteration(spent: np.ndarray, looked: list[bool]) -> float:
    """CPU seconds of an iteration: the median of those without a compilation and, if there are any, without a look."""
    spent, looks = spent[1:], np.array(looked[2 : len(spent) + 1])
    if not spent.size:
        return float("nan")
    return float(np.median(spent[~looks] if np.any(~looks) else spent))


def returns(run: Any) -> np.ndarray:
    """[looks, seeds]; one that is not finite counts as minus infinity."""
    J = array(run["J"])
    return np.where(np.isfinite(J), J, -np.inf)


def scores(found: Any) -> dict[str, np.ndarray]:
    """Of each agent's returns, [looks, seeds]: 0 for random actions, 1 for the best at the end."""
    ends = {row: np.median(returns(run)[-1]) for row, run in found.items()}
    low = ends[RANDOM]
    best = max((x for x in ends.values() if np.isfinite(x)), default=low)
    width = best - low if best > low else 1.0
    return {row: (returns(run) - low) / width for row, run in found.items()}


def conclude(numbers: Any) -> str:
    """The end of each agent on each task, and when it came within a tenth of the best."""
    missing = [row for row in ROWS if not any(row in found for found in numbers.values())]
    said = [_sentence(name, found) for name, found in numbers.items() if RANDOM in found]
    missing += [f"the task {name}" for name in FULL.tasks if name not in numbers]
    if missing:
        said.append(f"Not measured: {', '.join(missing)}.")
    return " ".join(said)


def _sentence(name: str, found: Any) -> str:
    words = []
    for row, score in sorted(scores(found).items(), key=lambda item: -np.median(item[1][-1])):
        run, J = found[row], returns(found[row])
        reached = np.flatnonzero(np.median(score, axis=1) >= 0.9)
        when = (
            ""
            if not reached.size
            else f", 90% after {run['steps'][reached[0]]} steps and {run['seconds'][reached[0]]:.2g} s"
        )
        solved, broken = int(np.sum(score[-1] >= 0.9)), int(np.sum(~np.isfinite(J[-1])))
        when += f", not finite on {broken}" if broken else ""
        words.append(f"{row} {np.median(J[-1]):.4g} ({solved} of {J.shape[1]} seeds{when})")
    return f"{name}, median last return, seeds within a tenth of the best: {'; '.join(words)}."


SHORT = {"2.0: ": "", "long branches": "long", "short horizon": "short windows", "continued": "cont.", "in the": "in"}


def _short(row: str) -> str:
    """What fits beside a curve."""
    for long, short in SHORT.items():
        row = row.replace(long, short)
    return row


STYLES = {row: style_of(_short(row), index=i) for i, row in enumerate(ROWS)}


def paint(numbers: Any) -> Any:
    """A row for each task: scores against real steps and against CPU time."""
    figure, axes = sheet(len(numbers), (1.75, 1.75))
    heading(figure, "The verdict: scores of returns on the true system (0 random actions, 1 the best agent's)")
    for panels, (name, found) in zip(axes, numbers.items(), strict=True):
        if RANDOM not in found:
            continue
        each = {row: score for row, score in scores(found).items() if row != RANDOM}
        for axis, x, label in zip(
            panels, ("steps", "seconds"), ("real steps", "CPU s, all seeds together"), strict=True
        ):
            log_limits(axis, "x", [found[row][x] for row in each])
            axis.set_ylim(-0.35, 1.08)
            lines = []
            for row, score in each.items():
                at, shown = array(found[row][x]), np.clip(score, -0.3, 1.05)
                there = at > 0
                if np.any(there):
                    lines.append(band(axis, STYLES[row], at[there], shown[there]))
            axis.set_xlabel(label)
            axis.set_ylabel("score")
            if lines:
                name_ends(axis, lines)
            title(axis, name)
    return figure
