"""Systems with analytic dynamics, in SI units, their parameters leaves."""

from diffmbrl.tasks.acrobot import acrobot
from diffmbrl.tasks.car import car
from diffmbrl.tasks.cartpole import cartpole_balance, cartpole_swingup
from diffmbrl.tasks.double_pendulum import double_pendulum
from diffmbrl.tasks.linear import linear_quadratic, lqr, random_lqr
from diffmbrl.tasks.pendulum import pendulum, pendulum_swingup
from diffmbrl.tasks.plant import delayed, noisy
from diffmbrl.tasks.quadrotor import quadrotor, quadrotor_waypoint
from diffmbrl.tasks.quadrotor2d import quadrotor2d
from diffmbrl.tasks.reacher import reacher
from diffmbrl.tasks.registry import TASKS, make
from diffmbrl.tasks.squash import squashed

__all__ = [
    "TASKS",
    "acrobot",
    "car",
    "cartpole_balance",
    "cartpole_swingup",
    "delayed",
    "double_pendulum",
    "linear_quadratic",
    "lqr",
    "make",
    "noisy",
    "pendulum",
    "pendulum_swingup",
    "quadrotor",
    "quadrotor2d",
    "quadrotor_waypoint",
    "random_lqr",
    "reacher",
    "squashed",
]
