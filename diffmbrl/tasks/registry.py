"""The table of tasks: a new one is one file and one row here."""

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
    """A task's constructor and its gradient contract."""

    make: Callable[..., Task]
    smooth: bool  # dynamics and reward are continuously differentiable
    differentiable_reward: bool  # dr/da reaches the action within the horizon, directly or through the dynamics
    # Steps to which a float32 gradient is right to 1%, up to 800: `python -m benchmarks safe_horizon`; of Brax's bodies, whose
    # gradients take long to compile, up to 100: `python -m benchmarks brax`; 0: wrong at 5 already. None: not measured.
    safe_horizon: int | None
    hidden: tuple[int, ...]  # hidden layers of the default policy
    states: tuple[str, ...]  # names and units of the n numbers of a state
    actions: tuple[str, ...]  # and of the m of an action
    dt: float | None = None  # seconds of a step, where the task takes long to build; None: the task says it


ANGLES = ("first [rad]", "second [rad]", "first rate [rad/s]", "second rate [rad/s]")
CART = ("x [m]", "angle [rad]", "v [m/s]", "w [rad/s]")
PENDULUM = ("angle [rad]", "rate [rad/s]")
FLIGHT = (
    *("x [m]", "y [m]", "z [m]", "roll [rad]", "pitch [rad]", "yaw [rad]", "vx [m/s]", "vy [m/s]", "vz [m/s]"),
    *("roll rate [rad/s]", "pitch rate [rad/s]", "yaw rate [rad/s]"),
)
PLANE = ("x [m]", "z [m]", "pitch [rad]", "vx [m/s]", "vz [m/s]", "pitch rate [rad/s]")
TWO_TORQUES = ("first torque [N m]", "second torque [N m]")
THRUST = ("thrust [N]", "roll torque [N m]", "pitch torque [N m]", "yaw torque [N m]")
BALL = ("q [m]", "v [m/s]")
TWO_BODIES = ("first [m]", "second [m]", "first speed [m/s]", "second speed [m/s]")
COURT = ("ball x [m]", "ball z [m]", "ball vx [m/s]", "ball vz [m/s]", "racket [m]", "tilt [rad]")
ROAD = ("x [m]", "y [m]", "heading [rad]", "speed [m/s]")

LEG, TWO, SWIMS = ("thigh", "shin", "foot"), ("first joint", "second joint"), ("x [m]", "y [m]", "heading [rad]")
LEGS = tuple(f"{leg} {part}" for leg in ("first", "second") for part in LEG)
EIGHT = tuple(f"{joint} {i}" for i in (1, 2, 3, 4) for joint in ("hip", "ankle"))


def with_rates(places: tuple[str, ...]) -> tuple[str, ...]:
    """Places and angles, and in the same order their rates."""
    return *places, *(x.replace("[m]", "speed [m/s]").replace("[rad]", "rate [rad/s]") for x in places)


def planar(joints: tuple[str, ...], free: tuple[str, ...] = ("x [m]", "z [m]", "pitch [rad]")) -> tuple[str, ...]:
    """The states of a runner in a plane, whose last number is the speed that is paid."""
    return *with_rates((*free, *(f"{joint} [rad]" for joint in joints))), "forward speed [m/s]"


def motors(joints: tuple[str, ...]) -> tuple[str, ...]:
    """Motors of an action of -1 to 1."""
    return tuple(f"{joint} motor [1]" for joint in joints)


CART_AND_TWO = with_rates(("x [m]", "first [rad]", "second [rad]"))
ARM = with_rates(("shoulder [rad]", "elbow [rad]", "target x [m]", "target y [m]"))
FREE_AND_EIGHT = (
    *("x [m]", "y [m]", "z [m]", "quaternion w", "quaternion x", "quaternion y", "quaternion z"),
    *(f"{joint} [rad]" for joint in EIGHT),
    *("x speed [m/s]", "y speed [m/s]", "z speed [m/s]", "roll rate [rad/s]", "pitch rate [rad/s]", "yaw rate [rad/s]"),
    *(f"{joint} rate [rad/s]" for joint in EIGHT),
    "forward speed [m/s]",
)

TASKS: dict[str, TaskRow] = {
    "lqr": TaskRow(lqr, True, True, 800, (16, 16), ("p [m]", "v [m/s]"), ("force [N]",)),
    "pendulum": TaskRow(pendulum, False, True, 50, (32, 32), PENDULUM, ("torque [N m]",)),
    "pendulum-swingup": TaskRow(pendulum_swingup, True, True, 400, (32, 32), PENDULUM, ("logit",)),
    "cartpole-balance": TaskRow(cartpole_balance, True, True, 50, (16, 16), CART, ("force [N]",)),
    "cartpole-swingup": TaskRow(cartpole_swingup, True, True, 800, (32, 32), CART, ("force [N]",)),
    "cartpole-continuous": TaskRow(cartpole_continuous, True, False, 0, (16, 16), CART, ("force [N]",)),
    "inverted-pendulum": TaskRow(inverted_pendulum, False, False, 0, (16, 16), CART, ("force [N]",)),
    "pets-cartpole": TaskRow(pets_cartpole, False, True, 800, (32, 32), CART, ("force [N]",)),
    "quadrotor2d": TaskRow(quadrotor2d, True, True, 800, (32, 32), PLANE, ("left thrust [N]", "right thrust [N]")),
    "acrobot": TaskRow(acrobot, True, True, 800, (32, 32), ANGLES, ("elbow torque [N m]",)),
    "double-pendulum": TaskRow(double_pendulum, True, True, 800, (32, 32), ANGLES, TWO_TORQUES),
    "reacher": TaskRow(reacher, True, True, 800, (32, 32), (*ANGLES, "target x [m]", "target y [m]"), TWO_TORQUES),
    "car": TaskRow(car, True, True, 800, (32, 32), ROAD, ("steering [rad]", "acceleration [m/s^2]")),
    "quadrotor": TaskRow(quadrotor, True, True, 200, (32, 32), FLIGHT, THRUST),
    "quadrotor-waypoint": TaskRow(quadrotor_waypoint, True, True, 100, (32, 32), FLIGHT, THRUST),
    "heaviside": TaskRow(heaviside, False, False, 0, (8,), ("x [m]",), ("step [m]",)),
    "ball-and-wall": TaskRow(ball_and_wall, False, True, 800, (8,), ("wall [m]", "ball [m]"), ("angle [rad]",)),
    "pushing": TaskRow(pushing, False, True, 800, (16, 16), TWO_BODIES, ("force [N]",)),
    "friction": TaskRow(friction, False, True, 800, (16, 16), TWO_BODIES, ("force [N]",)),
    "bouncing": TaskRow(bouncing, False, True, 800, (16, 16), BALL, ("force [N]",)),
    "bouncing-on-the-grid": TaskRow(bouncing_on_the_grid, False, True, 800, (16, 16), BALL, ("force [N]",)),
    "tennis": TaskRow(tennis, False, True, 800, (16, 16), COURT, ("racket speed [m/s]", "turn [rad/s]")),
    "math-test": TaskRow(
        math_test,
        False,
        False,
        0,
        (16,),
        ("place [m]", "first digit [1]", "second digit [1]"),
        ("choice [1]",),
    ),
    # Brax's, on its generalized backend.
    "brax-inverted-pendulum": TaskRow(
        brax_inverted_pendulum, False, False, 0, (32, 32), CART, ("force [300 N]",), 0.04
    ),
    "brax-inverted-pendulum-shaped": TaskRow(
        brax_inverted_pendulum_shaped, False, True, 100, (32, 32), CART, ("force [300 N]",), 0.04
    ),
    "brax-inverted-double-pendulum": TaskRow(
        brax_inverted_double_pendulum, False, True, 100, (32, 32), CART_AND_TWO, ("motor [1]",), 0.02
    ),
    "brax-reacher": TaskRow(brax_reacher, False, True, 100, (32, 32), ARM, motors(("shoulder", "elbow")), 0.02),
    "brax-swimmer": TaskRow(brax_swimmer, False, True, 100, (64, 64), planar(TWO, SWIMS), motors(TWO), 0.04),
    "brax-halfcheetah": TaskRow(brax_halfcheetah, False, True, 100, (64, 64), planar(LEGS), motors(LEGS), 0.05),
    "brax-hopper": TaskRow(brax_hopper, False, True, 10, (64, 64), planar(LEG), motors(LEG), 0.008),
    "brax-walker2d": TaskRow(brax_walker2d, False, True, 10, (64, 64), planar(LEGS), motors(LEGS), 0.008),
    "brax-ant": TaskRow(brax_ant, False, True, 0, (64, 64), FREE_AND_EIGHT, motors(EIGHT), 0.05),
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
            f"'{name}' is a real system, whose dynamics cannot be called: `diffmbrl learn` and `compare --learned` take it"
        )
    return TASKS[validate_choice("task", name, TASKS)]


def make(name: str, *, horizon: int | None = None, **parameters: Any) -> Task:
    """A task by name, with its default horizon and physical parameters unless given.

    Raises: `ValueError` for an unknown name or parameter, naming the nearest one; whatever the task itself refuses.

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
    """Names and units of the numbers of a state; numbered where the row has not as many, as with another backend."""
    names = TASKS[task.name].states
    return list(names) if len(names) == task.n else [f"state {i + 1}" for i in range(task.n)]
