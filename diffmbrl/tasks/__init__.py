"""Systems with analytic dynamics, in SI units, their parameters leaves."""

from diffmbrl.tasks.cartpole import cartpole_balance, cartpole_swingup
from diffmbrl.tasks.linear import linear_quadratic, lqr, random_lqr
from diffmbrl.tasks.pendulum import pendulum, pendulum_swingup
from diffmbrl.tasks.plant import delayed, noisy
from diffmbrl.tasks.quadrotor2d import quadrotor2d
from diffmbrl.tasks.registry import TASKS, make
from diffmbrl.tasks.squash import squashed

__all__ = [
    "TASKS",
    "cartpole_balance",
    "cartpole_swingup",
    "delayed",
    "linear_quadratic",
    "lqr",
    "make",
    "noisy",
    "pendulum",
    "pendulum_swingup",
    "quadrotor2d",
    "random_lqr",
    "squashed",
]
