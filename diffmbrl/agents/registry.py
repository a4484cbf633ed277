"""The table of agents. A new agent is one file and one row here, and one in tests/agents.py."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffmbrl.agents.bptt_agent import bptt, second_order, short_horizon
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.hybrid import hybrid
from diffmbrl.agents.mbpo import MBPO, branches_of
from diffmbrl.agents.model_free import OffPolicy, OnPolicy
from diffmbrl.agents.mpc_agent import mpc
from diffmbrl.agents.ppo import PPO
from diffmbrl.agents.practice import OffPolicyPractice, OnPolicyPractice
from diffmbrl.agents.protocol import Agent
from diffmbrl.agents.random_agent import RandomAgent
from diffmbrl.agents.sac import SAC
from diffmbrl.choices import validate_choice
from diffmbrl.core import Task, as_float
from diffmbrl.models import Training


class AgentRow(NamedTuple):
    """A constructor of an agent, and the defaults of its runs.

    Args:
        make: Makes the agent from a task and from options, which are keywords with defaults.
        description: One line of help.
        real_steps: The default number of real steps.
        evaluations: Episodes of each evaluation; 0 if the collected episodes have no noise and acting is expensive.
        default: Whether `diffmbrl race` runs it by default.
    """

    make: Callable[..., Agent]
    description: str
    real_steps: int
    evaluations: int = 8
    default: bool = True


def _random(task: Task, *, warmup: int = 100, every: int = 100) -> RandomAgent:
    return RandomAgent(warmup=warmup, every=every)


def _mbpo(
    task: Task, *, warmup: int = 200, every: int = 50, updates: int = 3000, rounds: int = 5, length: int = 0,
    discount: float = 0.99, rate: float = 3e-4, real: float = 0.05, units: int = 64,
) -> MBPO:  # fmt: skip
    # Whole episodes if a fall ends them. If nothing does, the critics would learn from branches that diverge.
    length = length or (20 if task.done is None else 200)
    learner = SAC(hidden=(units, units), rate=as_float(rate), discount=as_float(discount), follow=as_float(0.01))
    practice = OffPolicyPractice(as_float(real), updates=updates, rounds=rounds, batch=128, branches=60, steps=200)
    return MBPO(learner, _small_world(units), branches_of(length), practice, warmup=warmup, every=every)


def _model_ppo(
    task: Task, *, warmup: int = 200, every: int = 50, updates: int = 10, length: int = 60, discount: float = 0.99,
    rate: float = 1e-3, units: int = 64,
) -> MBPO:  # fmt: skip
    learner = PPO(hidden=(units, units), rate=as_float(rate), discount=as_float(discount), epochs=5, batches=16)
    practice = OnPolicyPractice(updates=updates, branches=60, steps=60)
    return MBPO(learner, _small_world(units), branches_of(length), practice, warmup=warmup, every=every)


def _model_reinforce(
    task: Task, *, warmup: int = 200, every: int = 50, updates: int = 50, length: int = 60, discount: float = 0.99,
    rate: float = 1e-2, units: int = 64,
) -> MBPO:  # fmt: skip
    learner = PPO.reinforce(hidden=(units, units), rate=as_float(rate), discount=as_float(discount))
    practice = OnPolicyPractice(updates=updates, branches=60, steps=60)
    return MBPO(learner, _small_world(units), branches_of(length), practice, warmup=warmup, every=every)


def _small_world(units: int) -> EnsembleTrainer:
    return EnsembleTrainer(Training(epochs=60, batch=64), members=5, elites=3, hidden=(units, units))


def _sac(
    task: Task, *, warmup: int = 500, every: int = 100, updates: int = 100, discount: float = 0.99, rate: float = 1e-3,
    units: int = 128,
) -> OffPolicy:  # fmt: skip
    learner = SAC(hidden=(units, units), rate=as_float(rate), discount=as_float(discount))
    return OffPolicy(learner, updates=updates, batch=128, warmup=warmup, every=every)


def _ppo(
    task: Task,
    *,
    every: int = 2048,
    environments: int = 16,
    discount: float = 0.99,
    rate: float = 3e-4,
    units: int = 64,
) -> OnPolicy:
    return OnPolicy(
        PPO(hidden=(units, units), rate=as_float(rate), discount=as_float(discount)),
        every=every,
        environments=environments,
    )


AGENTS: dict[str, AgentRow] = {
    "random": AgentRow(_random, "random actions within the limits: the lowest baseline", 2000),
    "mpc": AgentRow(mpc, "1.5: plans through an ensemble again at every step", 1000, 4),
    "bptt": AgentRow(bptt, "2.0: Adam through an ensemble's whole horizon", 2000),
    "second-order": AgentRow(second_order, "2.0 with Krylov-Newton, its discount rising", 2000),
    "short-horizon": AgentRow(short_horizon, "2.0 with short windows and a critic", 2000),
    "hybrid": AgentRow(
        hybrid, "CEM on a learned policy's proposals, with a learned value at the end of its plans", 2000, 4
    ),
    "mbpo": AgentRow(
        _mbpo,
        "SAC on branches of an ensemble from real states (length 0: 200 steps, or 20 without an end)",
        1000,
    ),
    "model-ppo": AgentRow(_model_ppo, "PPO on branches of an ensemble", 1000),
    "model-reinforce": AgentRow(
        _model_reinforce, "the policy gradient on branches of an ensemble", 1000, default=False
    ),
    "sac": AgentRow(_sac, "soft actor-critic on the real system, without a model", 10_000),
    "ppo": AgentRow(_ppo, "proximal policy optimisation on the real system, without a model", 50_000),
}


def make_agent(name: str, task: Task, options: Mapping[str, Any] | None = None) -> Agent:
    """Make an agent by its name.

    Args:
        name: A key of `AGENTS`.
        task: The task.
        options: Options that differ from their defaults; text is converted to the default's type.

    Returns:
        The agent.

    Raises:
        ValueError: If the name or an option is unknown, naming the nearest; if a value is not of its type, or the agent refuses
            it.

    >>> from diffmbrl import tasks
    >>> make_agent("random", tasks.pendulum(), {"every": "50"}).every
    50
    """
    row = AGENTS[validate_choice("agent", name, AGENTS)]
    return row.make(task, **_read(name, row, options or {}))


def options(name: str) -> dict[str, Any]:
    """List an agent's options.

    Args:
        name: A key of `AGENTS`.

    Returns:
        Their defaults by their names.
    """
    parameters = list(inspect.signature(AGENTS[name].make).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def agents_listing() -> str:
    """List all agents, each with its options and their defaults.

    Returns:
        The text.
    """
    lines = []
    for name, row in AGENTS.items():
        taken = " ".join(f"{option}={value}" for option, value in options(name).items())
        lines.append(f"{name}: {row.description}; {row.real_steps:,} real steps\n    {taken}")
    return "\n".join(lines)


def _read(name: str, row: AgentRow, given: Mapping[str, Any]) -> dict[str, Any]:
    takes, read = options(name), {}
    for option, value in given.items():
        validate_choice(f"option of agent '{name}'", option, takes)
        kind = type(takes[option])
        try:
            read[option] = kind(value) if isinstance(value, str) else value
        except ValueError:
            words = {int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"option {option} of agent '{name}' must be {words}, got '{value}'") from None
    return read
