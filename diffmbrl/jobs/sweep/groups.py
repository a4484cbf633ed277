"""Group the points of a sweep that compile to one program: their solvers, tasks, agents or systems differ only in leaves.

JAX decides which do: trees of the same structure, static fields included, with leaves of the same shapes and dtypes. A
learning rate, a mass and a discount are leaves; a horizon, a method and a layer's width are not.
"""

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from diffmbrl.agents.collect import System
from diffmbrl.agents.protocol import Agent
from diffmbrl.core import Solver, Task, is_planner
from diffmbrl.jobs import compare
from diffmbrl.jobs import learn as race
from diffmbrl.jobs.batch import planned_task
from diffmbrl.jobs.configs import CompareConfig, LearnConfig
from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint, point_config
from diffmbrl.methods import Method, solver
from diffmbrl.policies import Neural


class MethodPoint(NamedTuple):
    """A point of a sweep of methods, ready to run.

    Args:
        method: The method's row.
        solver: The solver with the point's learning rate.
        task: The task with the point's parameters.
        setting: The comparison that the point would be by itself.
        steps: The number of updates.
    """

    method: Method
    solver: Solver
    task: Task
    setting: CompareConfig
    steps: int


class AgentPoint(NamedTuple):
    """A point of a sweep of agents, ready to run.

    Args:
        agent: The agent with the point's options.
        system: The system that it learns from.
        setting: The learning job that the point would be by itself.
        real_steps: The number of real steps of each seed.
        evaluations: The number of episodes of each evaluation.
    """

    agent: Agent
    system: System
    setting: LearnConfig
    real_steps: int
    evaluations: int


Member = TypeVar("Member", MethodPoint, AgentPoint)


@dataclass(frozen=True)
class Group(Generic[Member]):
    """Points that run in one program.

    Args:
        points: The points.
        members: The solver or agent of each of them.
    """

    points: tuple[SweepPoint, ...]
    members: tuple[Member, ...]

    @property
    def seeds(self) -> int:
        """The number of seeds of each point."""
        return self.members[0].setting.seeds


def prepare(sweep: SweepFile, point: SweepPoint) -> MethodPoint | AgentPoint:
    """Make the solver or agent of a point, with its task or system.

    Args:
        sweep: The sweep that the point is of.
        point: The point.

    Returns:
        The point, ready to run.

    Raises:
        ValueError: If a value of the point is wrong, named as `compare` and `learn` name it.
    """
    try:
        config = point_config(sweep.job, sweep.x64, point.setting)
        return _method_point(config) if sweep.job == "compare" else _agent_point(config)
    except ValueError as error:
        shown = ", ".join(f"{name} = {point.setting[name]}" for name in sweep.varied)
        raise ValueError(f"{error}{f' (at {shown})' if shown else ''}") from None


def groups(sweep: SweepFile, points: list[SweepPoint]) -> list[Group]:
    """Group points by what compiles together, with at most `sweep.replicas` replicas (points times seeds) in a group.

    Args:
        sweep: The sweep that the points are of.
        points: The points to run.

    Returns:
        The groups, those of the same program as equal in size as possible.

    Raises:
        ValueError: If a value of a point is wrong.
    """
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
        most = max(1, sweep.replicas // pairs[0][1].setting.seeds)
        # Of equal size if possible: such groups share one compiled program.
        for part in np.array_split(np.arange(len(pairs)), -(-len(pairs) // most)):
            out.append(Group(tuple(pairs[i][0] for i in part), tuple(pairs[i][1] for i in part)))
    return out


def _method_point(config: CompareConfig) -> MethodPoint:
    resolved = compare.resolve(config)
    setting, task, [(name, row)] = resolved
    if bool(row.rates) != bool(setting.rates):
        wants = f"needs a learning rate: lr = {row.rates[0]:g}" if row.rates else "takes no lr: leave it out"
        raise ValueError(f"method {name} {wants}")
    steps = setting.steps or row.steps
    rate = setting.rates[0] if setting.rates else None
    made = solver(row, task, rate=rate, steps=steps, continuation=setting.continuation)
    return MethodPoint(row, made, task, setting, steps)


def _agent_point(config: LearnConfig) -> AgentPoint:
    resolved = race.resolve(config)
    [(name, made)] = resolved.agents.items()
    if resolved.evaluations[name] < 1:
        raise ValueError("evaluations must be at least 1: a sweep compares their returns")
    if not isinstance(resolved.system, System):
        raise ValueError(f"a sweep runs its points in one program; '{config.task}' is stepped on the host")
    return AgentPoint(made, resolved.system, resolved.config, resolved.real_steps, resolved.evaluations[name])


def _structure(member: MethodPoint | AgentPoint) -> Any:
    """A key that is equal for points that compile to one program."""
    if isinstance(member, AgentPoint):
        sizes = member.setting.seeds, member.real_steps, member.evaluations, member.setting.budget
        return _shape((member.agent, member.system)), sizes
    # A policy holds its action limits as constants, and so does the task of a planner that does not keep them itself.
    setting = member.setting
    policy = jax.eval_shape(lambda key: Neural.init(member.task, hidden=setting.hidden, key=key), jax.random.key(0))
    sizes = setting.seeds, setting.starts, member.steps, setting.budget, setting.methods, setting.estimators
    task = planned_task(member.solver, member.task) if is_planner(member.solver) else member.task
    return _shape((member.solver, task, policy)), sizes


def _shape(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)
