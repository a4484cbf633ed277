"""The table of drawings by name of the task, and the frames of a trajectory.

A task without a row is drawn as a phase plot. To add a drawing, write a function (task, s) -> shapes and add a row.
"""

from collections.abc import Callable

import numpy as np

from diffmbrl.core import Task
from diffmbrl.render import shapes
from diffmbrl.render.brax import bodies
from diffmbrl.render.shapes import Array, Shape, phase


def _pendulum_observed(task: Task, s: Array) -> list[Shape]:
    return shapes.draw_pendulum(task, np.array([np.arctan2(s[1], s[0])]))


DRAWINGS: dict[str, Callable[[Task, Array], list[Shape]]] = {
    "lqr": shapes.draw_block,
    "pendulum": shapes.draw_pendulum,
    "pendulum-swingup": shapes.draw_pendulum,
    "cartpole-balance": shapes.draw_cartpole,
    "cartpole-swingup": shapes.draw_cartpole,
    "cartpole-continuous": shapes.draw_rod_on_cart,
    "inverted-pendulum": shapes.draw_rod_on_cart,
    "pets-cartpole": shapes.draw_rod_on_cart,
    "quadrotor2d": shapes.draw_quadrotor2d,
    "acrobot": shapes.draw_two_links,
    "double-pendulum": shapes.draw_two_links,
    "reacher": shapes.draw_reacher,
    "car": shapes.draw_car,
    "quadrotor": shapes.draw_quadrotor,
    "quadrotor-waypoint": shapes.draw_quadrotor,
    "heaviside": shapes.draw_edge,
    "ball-and-wall": shapes.draw_ball_and_wall,
    "pushing": shapes.draw_pushing,
    "friction": shapes.draw_friction,
    "bouncing": shapes.draw_bouncing,
    "bouncing-on-the-grid": shapes.draw_bouncing,
    "tennis": shapes.draw_tennis,
    "math-test": shapes.draw_math_test,
    "brax-inverted-pendulum": bodies,
    "brax-inverted-pendulum-shaped": bodies,
    "brax-inverted-double-pendulum": bodies,
    "brax-reacher": bodies,
    "brax-swimmer": bodies,
    "brax-halfcheetah": bodies,
    "brax-hopper": bodies,
    "brax-walker2d": bodies,
    "brax-ant": bodies,
    # Gymnasium environments whose observations have a known meaning.
    "gym:Pendulum-v1": _pendulum_observed,
    "gym:InvertedPendulum-v5": shapes.draw_cartpole,
}


def frames(task: Task, s: Array) -> list[list[Shape]]:
    """Draw each state of a trajectory: with the drawing of its task, or as a phase plot if the task has none.

    Args:
        task: The task.
        s: States, shape [T+1, n].

    Returns: T+1 lists of shapes.

    Raises:
        ValueError: If the states do not fit the task.

    >>> from diffmbrl import tasks
    >>> [[rod, *_]] = frames(tasks.pendulum(), np.zeros((1, 2)))
    >>> rod.points.tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    s = np.asarray(s, np.float64)
    if s.ndim != 2 or s.shape[1] != task.n:
        raise ValueError(f"states of task '{task.name}' must have shape [T+1, {task.n}], got {list(s.shape)}")
    draw = DRAWINGS.get(task.name)
    return phase(s) if draw is None else [draw(task, state) for state in s]
