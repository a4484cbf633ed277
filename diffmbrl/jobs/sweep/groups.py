"""Which points are one program: those whose solvers, tasks, agents and systems differ in the values of their leaves alone.

What compiles together is what JAX says does: trees of the same structure, static fields and all, with leaves of the same
shapes and types. So it is asked, rather than a list kept of which settings are sizes: a learning rate, a mass, a discount
are leaves; a horizon, a method, a layer are not.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from diffmbrl.agents.collect import System
from diffmbrl.agents.learn import Agent
from diffmbrl.core import Solver, Task, is_planner
from diffmbrl.jobs import compare
from diffmbrl.jobs import learn as race
from diffmbrl.jobs.configs import CompareConfig, LearnConfig
from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint, point_config
from diffmbrl.methods import Method, solver
from diffmbrl.policies import Neural
from diffmbrl.tasks.transforms.squash import squashed


class MethodPoint(NamedTuple):
    """A point of a sweep of methods, ready to run."""

    method: Method
    solver: Solver
    task: Task
    plant: Task  # what a planner plans on: action limits moved into it, unless the planner keeps them
    setting: CompareConfig
    steps: int


class AgentPoint(NamedTuple):
    """A point of a sweep of agents, ready to run."""

    agent: Agent
    system: System
    setting: LearnConfig
    real_steps: int
    evaluations: int


class Group(NamedTuple):
    """Points that are lanes of one program, and what they are."""

    points: tuple[SweepPoint, ...]
    members: tuple[Any, ...]

    @property
    def seeds(self) -> int:
        return self.members[0].setting.seeds


def prepare(sweep: SweepFile, point: SweepPoint) -> MethodPoint | AgentPoint:
    """What a point means. Raises: `ValueError` naming the value that is wrong, as `compare` and `learn` do."""
    try:
        config = point_config(sweep.job, sweep.x64, point.setting)
        return _policies(config) if sweep.job == "compare" else _agents(config)
    except ValueError as error:
        shown = ", ".join(f"{name} = {point.setting[name]}" for name in sweep.varied)
        raise ValueError(f"{error}{f' (at {shown})' if shown else ''}") from None


def groups(sweep: SweepFile, points: list[SweepPoint]) -> list[Group]:
    """The points, by what compiles together, each group of at most `sweep.lanes` lanes (points times seeds)."""
    found: list[tuple[Any, list[tuple[SweepPoint, Any]]]] = []
    for point in points:
        member = prepare(sweep, point)
        structure = _structure(member)
        for other, members in found:
            if other == structure:
                members.append((point, member))
                break
        else:
            found.append((structure, [(point, member)]))
    out = []
    for _, pairs in found:
        most = max(1, sweep.lanes // pairs[0][1].setting.seeds)
        # As even as can be: groups of the same size share what is compiled.
        for part in np.array_split(np.arange(len(pairs)), -(-len(pairs) // most)):
            out.append(Group(tuple(pairs[i][0] for i in part), tuple(pairs[i][1] for i in part)))
    return out


def _policies(config: CompareConfig) -> MethodPoint:
    resolved = compare.resolve(config)
    setting, task, [(name, row)] = resolved
    if bool(row.rates) != bool(setting.rates):
        wants = f"needs a learning rate: lr = {row.rates[0]:g}" if row.rates else "takes no lr: leave it out"
        raise ValueError(f"method {name} {wants}")
    steps = setting.steps or row.steps
    rate = setting.rates[0] if setting.rates else None
    made = solver(row, task, rate=rate, steps=steps, continuation=setting.continuation)
    return MethodPoint(
        row, made, task, task if not is_planner(made) or made.keeps_limits else squashed(task), setting, steps
    )


def _agents(config: LearnConfig) -> AgentPoint:
    resolved = race.resolve(config)
    [(name, made)] = resolved.agents.items()
    if resolved.evaluations[name] < 1:
        raise ValueError("evaluations must be at least 1: they are what a sweep compares")
    if not isinstance(resolved.system, System):
        raise ValueError(f"a sweep's points are lanes of one program; '{config.task}' is stepped on the host")
    return AgentPoint(made, resolved.system, resolved.config, resolved.real_steps, resolved.evaluations[name])


def _structure(member: MethodPoint | AgentPoint) -> Any:
    """Equal for points that are one program."""
    if isinstance(member, AgentPoint):
        sizes = member.setting.seeds, member.real_steps, member.evaluations, member.setting.budget
        return _shape((member.agent, member.system)), sizes
    # A policy holds the limits of its actions as constants.
    setting = member.setting
    policy = jax.eval_shape(lambda key: Neural.init(member.task, hidden=setting.hidden, key=key), jax.random.key(0))
    sizes = setting.seeds, setting.starts, member.steps, setting.budget, setting.methods, setting.estimators
    return _shape((member.solver, member.task, member.plant, policy)), sizes


def _shape(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)
