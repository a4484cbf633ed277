"""The table of tasks. A new task is one file and one row here."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from diffmbrl.choices import validate_choice
from diffmbrl.core import Task
from diffmbrl.tasks.acrobot import acrobot
from diffmbrl.tasks.adapters.brax_tasks import (
    brax_ant,
    brax_halfcheetah,
    brax_hopper,
    brax_inverted_double_pendulum,
    brax_inverted_pendulum,
    brax_inverted_pendulum_shaped,
    brax_reacher,
    brax_swimmer,
    brax_walker2d,
)
from diffmbrl.tasks.adapters.gymnasium import PREFIX
from diffmbrl.tasks.balancing import cartpole_continuous, inverted_pendulum
from diffmbrl.tasks.bouncing import bouncing, bouncing_on_the_grid
from diffmbrl.tasks.car import car
from diffmbrl.tasks.cartpole import cartpole_balance, cartpole_swingup
from diffmbrl.tasks.coordinates import (
    ANGLES,
    ARM,
    BALL,
    CART,
    CART_AND_TWO,
    COURT,
    DRIVE,
    EIGHT,
    FLIGHT,
    FORCE,
    FORCE_300,
    FREE_AND_EIGHT,
    LEG,
    LEGS,
    MOTOR,
    PENDULUM,
    PLANE,
    RACKET,
    REACH,
    ROAD,
    SHEET,
    SWIMS,
    THRUST,
    TWO,
    TWO_BODIES,
    TWO_THRUSTS,
    TWO_TORQUES,
    WALL,
    motors,
    planar,
)
from diffmbrl.tasks.double_pendulum import double_pendulum
from diffmbrl.tasks.landscapes import heaviside
from diffmbrl.tasks.linear import lqr
from diffmbrl.tasks.math_test import math_test
from diffmbrl.tasks.pendulum import pendulum, pendulum_swingup
from diffmbrl.tasks.pets_cartpole import pets_cartpole
from diffmbrl.tasks.pushing import friction, pushing
from diffmbrl.tasks.quadrotor import quadrotor, quadrotor_waypoint
from diffmbrl.tasks.quadrotor2d import quadrotor2d
from diffmbrl.tasks.reacher import reacher
from diffmbrl.tasks.tennis import tennis
from diffmbrl.tasks.throwing import ball_and_wall


class TaskRow(NamedTuple):
    """One row of the table of tasks: a constructor, and facts that take long to compute or that code cannot tell.

    Args:
        make: Constructor of the task; all of its parameters are keywords with defaults.
        smooth: Whether dynamics and reward are continuously differentiable.
        safe_horizon: Number of steps up to which a float32 gradient is right to 1%; at most 800
            (`python -m benchmarks safe_horizon`), or 100 for Brax's bodies, whose gradients take long to compile
            (`python -m benchmarks brax`). 0 if it is already wrong at 5 steps, None if it was not measured.
        states: Names and units of the n numbers of a state.
        actions: Names and units of the m numbers of an action.
        hidden: Widths of the hidden layers of the default policy.
        differentiable_reward: Whether a derivative of the reward reaches the action within the horizon, directly or
            through the dynamics.
        dt: Seconds of a step, for a task that takes long to build; None if the task is to be asked.
    """

    make: Callable[..., Task]
    smooth: bool
    safe_horizon: int | None
    states: tuple[str, ...]
    actions: tuple[str, ...]
    hidden: tuple[int, ...] = (32, 32)
    differentiable_reward: bool = True
    dt: float | None = None


TASKS: dict[str, TaskRow] = {
    "lqr": TaskRow(lqr, smooth=True, safe_horizon=800, hidden=(16, 16), states=("p [m]", "v [m/s]"), actions=FORCE),
    "pendulum": TaskRow(pendulum, smooth=False, safe_horizon=50, states=PENDULUM, actions=("torque [N m]",)),
    "pendulum-swingup": TaskRow(pendulum_swingup, smooth=True, safe_horizon=400, states=PENDULUM, actions=("logit",)),
    "cartpole-balance": TaskRow(
        cartpole_balance, smooth=True, safe_horizon=50, hidden=(16, 16), states=CART, actions=FORCE
    ),
    "cartpole-swingup": TaskRow(cartpole_swingup, smooth=True, safe_horizon=800, states=CART, actions=FORCE),
    "cartpole-continuous": TaskRow(
        cartpole_continuous,
        smooth=True,
        safe_horizon=0,
        differentiable_reward=False,
        hidden=(16, 16),
        states=CART,
        actions=FORCE,
    ),
    "inverted-pendulum": TaskRow(
        inverted_pendulum,
        smooth=False,
        safe_horizon=0,
        differentiable_reward=False,
        hidden=(16, 16),
        states=CART,
        actions=FORCE,
    ),
    "pets-cartpole": TaskRow(pets_cartpole, smooth=False, safe_horizon=800, states=CART, actions=FORCE),
    "quadrotor2d": TaskRow(quadrotor2d, smooth=True, safe_horizon=800, states=PLANE, actions=TWO_THRUSTS),
    "acrobot": TaskRow(acrobot, smooth=True, safe_horizon=800, states=ANGLES, actions=("elbow torque [N m]",)),
    "double-pendulum": TaskRow(double_pendulum, smooth=True, safe_horizon=800, states=ANGLES, actions=TWO_TORQUES),
    "reacher": TaskRow(reacher, smooth=True, safe_horizon=800, states=REACH, actions=TWO_TORQUES),
    "car": TaskRow(car, smooth=True, safe_horizon=800, states=ROAD, actions=DRIVE),
    "quadrotor": TaskRow(quadrotor, smooth=True, safe_horizon=200, states=FLIGHT, actions=THRUST),
    "quadrotor-waypoint": TaskRow(quadrotor_waypoint, smooth=True, safe_horizon=100, states=FLIGHT, actions=THRUST),
    "heaviside": TaskRow(
        heaviside,
        smooth=False,
        safe_horizon=0,
        differentiable_reward=False,
        hidden=(8,),
        states=("x [m]",),
        actions=("step [m]",),
    ),
    "ball-and-wall": TaskRow(
        ball_and_wall, smooth=False, safe_horizon=800, hidden=(8,), states=WALL, actions=("angle [rad]",)
    ),
    "pushing": TaskRow(pushing, smooth=False, safe_horizon=800, hidden=(16, 16), states=TWO_BODIES, actions=FORCE),
    "friction": TaskRow(friction, smooth=False, safe_horizon=800, hidden=(16, 16), states=TWO_BODIES, actions=FORCE),
    "bouncing": TaskRow(bouncing, smooth=False, safe_horizon=800, hidden=(16, 16), states=BALL, actions=FORCE),
    "bouncing-on-the-grid": TaskRow(
        bouncing_on_the_grid, smooth=False, safe_horizon=800, hidden=(16, 16), states=BALL, actions=FORCE
    ),
    "tennis": TaskRow(tennis, smooth=False, safe_horizon=800, hidden=(16, 16), states=COURT, actions=RACKET),
    "math-test": TaskRow(
        math_test,
        smooth=False,
        safe_horizon=0,
        differentiable_reward=False,
        hidden=(16,),
        states=SHEET,
        actions=("choice [1]",),
    ),
    # Brax's bodies, on its generalized backend by default.
    "brax-inverted-pendulum": TaskRow(
        brax_inverted_pendulum,
        smooth=False,
        safe_horizon=0,
        differentiable_reward=False,
        states=CART,
        actions=FORCE_300,
        dt=0.04,
    ),
    "brax-inverted-pendulum-shaped": TaskRow(
        brax_inverted_pendulum_shaped, smooth=False, safe_horizon=100, states=CART, actions=FORCE_300, dt=0.04
    ),
    "brax-inverted-double-pendulum": TaskRow(
        brax_inverted_double_pendulum, smooth=False, safe_horizon=100, states=CART_AND_TWO, actions=MOTOR, dt=0.02
    ),
    "brax-reacher": TaskRow(
        brax_reacher, smooth=False, safe_horizon=100, states=ARM, actions=motors(("shoulder", "elbow")), dt=0.02
    ),
    "brax-swimmer": TaskRow(
        brax_swimmer,
        smooth=False,
        safe_horizon=100,
        hidden=(64, 64),
        states=planar(TWO, SWIMS),
        actions=motors(TWO),
        dt=0.04,
    ),
    "brax-halfcheetah": TaskRow(
        brax_halfcheetah,
        smooth=False,
        safe_horizon=100,
        hidden=(64, 64),
        states=planar(LEGS),
        actions=motors(LEGS),
        dt=0.05,
    ),
    "brax-hopper": TaskRow(
        brax_hopper, smooth=False, safe_horizon=10, hidden=(64, 64), states=planar(LEG), actions=motors(LEG), dt=0.008
    ),
    "brax-walker2d": TaskRow(
        brax_walker2d,
        smooth=False,
        safe_horizon=10,
        hidden=(64, 64),
        states=planar(LEGS),
        actions=motors(LEGS),
        dt=0.008,
    ),
    "brax-ant": TaskRow(
        brax_ant, smooth=False, safe_horizon=0, hidden=(64, 64), states=FREE_AND_EIGHT, actions=motors(EIGHT), dt=0.05
    ),
}


def task_row(name: str) -> TaskRow:
    """Look up a task in the table.

    Args:
        name: Name of the task, a key of `TASKS`.

    Returns:
        The task's row.

    Raises:
        ValueError: If there is no task of this name, or if it names a Gymnasium environment, which is no row of the table.
    """
    if name.startswith(PREFIX):
        raise ValueError(
            f"'{name}' is a real system, whose dynamics cannot be called: `diffmbrl learn` and `diffmbrl race` take it"
        )
    return TASKS[validate_choice("task", name, TASKS)]


def make(name: str, *, horizon: int | None = None, **parameters: Any) -> Task:
    """Make a task by name, with its default horizon and physical parameters unless they are given.

    Args:
        name: Name of the task, a key of `TASKS`.
        horizon: Number of steps; None for the task's default.
        **parameters: Physical parameters of the task's constructor, in SI units.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such task or parameter (the error suggests the most similar name), or if the
            constructor refuses a value.

    >>> make("cartpole-balance", horizon=50, m_p=0.2).horizon
    50
    """
    row = task_row(name)
    options = [p for p in inspect.signature(row.make).parameters if p != "horizon"]
    for parameter in parameters:
        validate_choice(f"parameter of task '{name}'", parameter, options)
    if horizon is not None:
        parameters["horizon"] = horizon
    return row.make(**parameters)


def state_names(task: Task) -> list[str]:
    """Return the names and units of the numbers of a task's state.

    Args:
        task: A task of the table.

    Returns:
        n names; they are numbered if the table has another count, as for a Brax task on another backend.
    """
    names = TASKS[task.name].states
    return list(names) if len(names) == task.n else [f"state {i + 1}" for i in range(task.n)]
