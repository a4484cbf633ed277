"""The table that a new agent joins by one row; test_agents.py holds every row to the contract of `agents.Agent`."""

from typing import Any, NamedTuple

from diffmbrl.agents import Idle


class Row(NamedTuple):
    """A small agent, for `tasks.pendulum(horizon=10)` and others of one limited action, and what it promises."""

    name: str  # of its row in diffmbrl/agents/registry.py
    make: Any  # of a task
    real_steps: int = 60
    model: bool = False  # whether it shows its model
    tolerance: float = 1e-4  # of what it learns, beside other seeds and alone
    slow: bool = False  # its parts stand in other rows: not repeated in continuous integration


AGENTS = [
    Row("random", lambda task: Idle(warmup=20, every=20)),
]
