"""The table of tasks: a new one is one file and one row here."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple

from diffmbrl.core import Task
from diffmbrl.tasks.cartpole import cartpole_balance, cartpole_swingup
from diffmbrl.tasks.linear import lqr
from diffmbrl.tasks.pendulum import pendulum, pendulum_swingup
from diffmbrl.tasks.quadrotor2d import quadrotor2d


class Row(NamedTuple):
    """A task's constructor and its gradient contract."""

    make: Callable[..., Task]
    smooth: bool  # dynamics and reward are continuously differentiable
    differentiable_reward: bool  # dr/da reaches the action within the horizon, directly or through the dynamics
    safe_horizon: (
        int  # steps to which a float32 gradient is right to 1%, up to 800: `python -m benchmarks safe_horizon`
    )
    hidden: tuple[int, ...]  # hidden layers of the default policy


TASKS: dict[str, Row] = {
    "lqr": Row(lqr, True, True, 800, (16, 16)),
    "pendulum": Row(pendulum, False, True, 50, (32, 32)),
    "pendulum-swingup": Row(pendulum_swingup, True, True, 400, (32, 32)),
    "cartpole-balance": Row(cartpole_balance, True, True, 50, (16, 16)),
    "cartpole-swingup": Row(cartpole_swingup, True, True, 800, (32, 32)),
    "quadrotor2d": Row(quadrotor2d, True, True, 800, (32, 32)),
}


def make(name: str, *, horizon: int | None = None, **parameters: Any) -> Task:
    """A task by name, with its default horizon and physical parameters unless given.

    Raises: `ValueError` for an unknown name or parameter, naming the nearest one; whatever the task itself refuses.

    >>> make("cartpole-balance", horizon=50, m_p=0.2).horizon
    50
    """
    row = TASKS[known("task", name, TASKS)]
    options = [p for p in inspect.signature(row.make).parameters if p != "horizon"]
    for parameter in parameters:
        known(f"parameter of task '{name}'", parameter, options)
    if horizon is not None:
        parameters["horizon"] = horizon
    return row.make(**parameters)


def known(what: str, name: str, names: Any) -> str:
    """`name` if it is one of `names`; else a `ValueError` with the nearest."""
    if name in names:
        return name
    lower = {known.lower(): known for known in names}
    nearest = lower[get_close_matches(name.lower(), list(lower), n=1, cutoff=0.0)[0]]
    raise ValueError(f"unknown {what} '{name}'; did you mean '{nearest}'? There are: {', '.join(names)}")
