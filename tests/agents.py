"""The table that a new agent joins by one row; test_agents.py holds every row to the contract of `agents.Agent`."""

from typing import Any, NamedTuple

from diffmbrl.agents import (
    MBPO,
    PPO,
    SAC,
    EnsembleTrainer,
    OffPolicy,
    OffPolicyPractice,
    OnPolicy,
    OnPolicyPractice,
    RandomAgent,
)
from diffmbrl.agents.registry import make_agent
from diffmbrl.models import NetworkDynamics, Training

STEPS = {"warmup": 20, "every": 20}
WORLD = EnsembleTrainer(Training(epochs=2, batch=16), members=2, elites=1, hidden=(8,), model=NetworkDynamics.init)
STREAMED = OnPolicyPractice(updates=2, branches=4, steps=5)
SMALL_PPO = {"hidden": (8,), "batches": 2, "epochs": 2}


class Row(NamedTuple):
    """A small agent, for `tasks.pendulum(horizon=10)` and others of one limited action, and what it promises."""

    name: str  # of its row in diffmbrl/agents/registry.py
    make: Any  # of a task
    real_steps: int = 60
    model: bool = False  # whether it shows its model
    tolerance: float = 1e-4  # of what it learns, beside other seeds and alone
    slow: bool = False  # its parts stand in other rows: not repeated in continuous integration


AGENTS = [
    Row("random", lambda task: RandomAgent(warmup=20, every=20)),
    Row(
        "mbpo",
        lambda task: MBPO(
            SAC(hidden=(8,)),
            WORLD,
            practice=OffPolicyPractice(updates=4, rounds=2, batch=16, branches=4, steps=3),
            **STEPS,
        ),
        model=True,
        tolerance=1e-3,
        slow=True,  # test_mbpo.py
    ),
    Row(
        "model-ppo",
        lambda task: MBPO(PPO(**SMALL_PPO), WORLD, practice=STREAMED, **STEPS),
        model=True,
        tolerance=1e-3,
        slow=True,
    ),
    Row(
        "model-reinforce",
        lambda task: MBPO(PPO.reinforce(hidden=(8,)), WORLD, practice=STREAMED, **STEPS),
        model=True,
        tolerance=1e-3,
        slow=True,
    ),
    Row(
        "sac",
        lambda task: OffPolicy(SAC(hidden=(8,)), updates=3, batch=16, warmup=20, every=20),
        tolerance=1e-3,
        slow=True,
    ),
    Row("ppo", lambda task: OnPolicy(PPO(**SMALL_PPO), every=20, environments=2), tolerance=1e-3),
    Row(
        "mpc",
        lambda task: make_agent("mpc", task, STEPS | {"seconds": 0.2, "members": 2, "units": 8}),
        model=True,
        tolerance=1e-2,
        slow=True,  # test_mpc_agent.py
    ),
    Row(
        "bptt", lambda task: make_agent("bptt", task, STEPS | {"updates": 2}), model=True, tolerance=1e-3, slow=True
    ),  # test_policy_agents.py
    Row(
        "second-order",
        lambda task: make_agent("second-order", task, STEPS | {"updates": 1, "continued": 0}),
        model=True,
        tolerance=1e-2,
        slow=True,
    ),
    Row(
        "short-horizon",
        lambda task: make_agent("short-horizon", task, STEPS | {"updates": 2, "window": 4}),
        model=True,
        tolerance=1e-3,
        slow=True,
    ),
    Row(
        "hybrid",
        lambda task: make_agent("hybrid", task, STEPS | {"updates": 2, "horizon": 3, "iterations": 1}),
        model=True,
        tolerance=1e-3,
        slow=True,
    ),
]
