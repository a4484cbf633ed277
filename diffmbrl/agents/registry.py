"""The table of agents: a new one is one file and one row here (and one in tests/agents.py)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffmbrl.agents.bptt_agent import bptt, second_order, short_horizon
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.hybrid import hybrid
from diffmbrl.agents.learn import Agent
from diffmbrl.agents.mbpo import MBPO, branches_of
from diffmbrl.agents.model_free import OffPolicy, OnPolicy
from diffmbrl.agents.mpc_agent import mpc
from diffmbrl.agents.ppo import PPO
from diffmbrl.agents.practice import OffPolicyPractice, OnPolicyPractice
from diffmbrl.agents.random_agent import RandomAgent
from diffmbrl.agents.sac import SAC
from diffmbrl.choices import validate_choice
from diffmbrl.core import Task, as_float
from diffmbrl.models import Training


class AgentRow(NamedTuple):
    """How an agent is made, and how it is run where nothing else is asked for."""

    make: Callable[..., Agent]  # of a task and of options, which are keywords with defaults
    description: str  # what it is, in a line
    real_steps: int  # by default
    evaluations: int = 8  # starts of each evaluation; 0 where its episodes show it as it is, and acting is expensive
    default: bool = True  # whether `diffmbrl race` runs it by default


def _random(task: Task, *, warmup: int = 100, every: int = 100) -> RandomAgent:
    return RandomAgent(warmup=warmup, every=every)


def _mbpo(
    task: Task, *, warmup: int = 200, every: int = 50, updates: int = 3000, rounds: int = 5, length: int = 0,
    discount: float = 0.99, rate: float = 3e-4, real: float = 0.05, units: int = 64,
) -> MBPO:  # fmt: skip
    # Whole episodes where a fall ends them; where nothing does, a branch that runs away is all that the critics see.
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
    "random": AgentRow(_random, "random actions within the limits: the baseline below all", 2000),
    "mpc": AgentRow(mpc, "1.5: plans through an ensemble, anew at every step", 1000, 4),
    "bptt": AgentRow(bptt, "2.0: Adam through an ensemble's whole horizon", 2000),
    "second-order": AgentRow(second_order, "2.0 with Krylov-Newton, its discount rising", 2000),
    "short-horizon": AgentRow(short_horizon, "2.0 with short windows and a critic", 2000),
    "hybrid": AgentRow(hybrid, "a policy that proposes, CEM that improves, a critic at the end of its plans", 2000, 4),
    "mbpo": AgentRow(
        _mbpo,
        "SAC on branches of an ensemble from real states (length 0: 200 steps, or 20 without an end)",
        1000,
    ),
    "model-ppo": AgentRow(_model_ppo, "PPO on branches of an ensemble", 1000),
    "model-reinforce": AgentRow(
        _model_reinforce, "the policy gradient on branches of an ensemble", 1000, default=False
    ),
    "sac": AgentRow(_sac, "soft actor-critic on the real system alone", 10_000),
    "ppo": AgentRow(_ppo, "proximal policy optimisation on the real system alone", 50_000),
}


def make_agent(name: str, task: Task, options: Mapping[str, Any] | None = None) -> Agent:
    """An agent by name, with its defaults but for the options given; those that are text are read as the default's kind.

    Raises: `ValueError` for an unknown name or option, naming the nearest one, or a value that is not of its kind; whatever the
    agent itself refuses.

    >>> from diffmbrl import tasks
    >>> make_agent("random", tasks.pendulum(), {"every": "50"}).every
    50
    """
    row = AGENTS[validate_choice("agent", name, AGENTS)]
    return row.make(task, **_read(name, row, options or {}))


def options(name: str) -> dict[str, Any]:
    """What an agent's options are, with their defaults."""
    parameters = list(inspect.signature(AGENTS[name].make).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def agents_listing() -> str:
    """A screen of all agents, each with its options and their defaults."""
    lines = []
    for name, row in AGENTS.items():
        said = " ".join(f"{option}={value}" for option, value in options(name).items())
        lines.append(f"{name}: {row.description}; {row.real_steps:,} real steps\n    {said}")
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
