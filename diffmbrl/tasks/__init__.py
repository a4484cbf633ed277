"""Systems with analytic dynamics, in SI units, and Brax's bodies; their parameters are leaves."""

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
from diffmbrl.tasks.balancing import cartpole_continuous, inverted_pendulum
from diffmbrl.tasks.bouncing import bouncing, bouncing_on_the_grid, bouncing_penalty
from diffmbrl.tasks.car import car
from diffmbrl.tasks.cartpole import cartpole_balance, cartpole_swingup
from diffmbrl.tasks.double_pendulum import double_pendulum
from diffmbrl.tasks.landscapes import heaviside, sinusoid, soft_heaviside
from diffmbrl.tasks.linear import linear_quadratic, lqr, random_lqr
from diffmbrl.tasks.math_test import math_test
from diffmbrl.tasks.pendulum import pendulum, pendulum_swingup
from diffmbrl.tasks.pets_cartpole import pets_cartpole
from diffmbrl.tasks.pushing import friction, pushing
from diffmbrl.tasks.quadrotor import quadrotor, quadrotor_waypoint
from diffmbrl.tasks.quadrotor2d import quadrotor2d
from diffmbrl.tasks.reacher import reacher
from diffmbrl.tasks.registry import TASKS, make
from diffmbrl.tasks.tennis import tennis
from diffmbrl.tasks.throwing import ball_and_wall
from diffmbrl.tasks.transforms.margin import soft_margin
from diffmbrl.tasks.transforms.plant import delayed, noisy
from diffmbrl.tasks.transforms.squash import squashed

__all__ = [
    "TASKS",
    "acrobot",
    "ball_and_wall",
    "bouncing",
    "bouncing_on_the_grid",
    "bouncing_penalty",
    "brax_ant",
    "brax_halfcheetah",
    "brax_hopper",
    "brax_inverted_double_pendulum",
    "brax_inverted_pendulum",
    "brax_inverted_pendulum_shaped",
    "brax_reacher",
    "brax_swimmer",
    "brax_walker2d",
    "car",
    "cartpole_balance",
    "cartpole_continuous",
    "cartpole_swingup",
    "delayed",
    "double_pendulum",
    "friction",
    "heaviside",
    "inverted_pendulum",
    "linear_quadratic",
    "lqr",
    "make",
    "math_test",
    "noisy",
    "pendulum",
    "pendulum_swingup",
    "pets_cartpole",
    "pushing",
    "quadrotor",
    "quadrotor2d",
    "quadrotor_waypoint",
    "random_lqr",
    "reacher",
    "sinusoid",
    "soft_heaviside",
    "soft_margin",
    "squashed",
    "tennis",
]
