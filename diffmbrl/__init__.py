"""Differentiable simulation in model-based reinforcement learning, first and second order side by side."""

# Before anything can compile: XLA reads its flags once.
# isort: off
from diffmbrl.xla import compile_small_loops_whole

compile_small_loops_whole()
# isort: on

from diffmbrl import tasks
from diffmbrl.constraints import Constraints
from diffmbrl.core import Task, Trajectory
from diffmbrl.diagnostics.health import gradient_health
from diffmbrl.gradients import BPTT, LikelihoodRatio, Truncated
from diffmbrl.info import Info
from diffmbrl.optimizers import (
    BestSoFar,
    Consensus,
    Continuation,
    GaussNewton,
    KrylovNewton,
    MultiStart,
    NewtonCG,
    OptaxSolver,
    Sequential,
    ShortHorizon,
)
from diffmbrl.planners import CEM, DDP, ILQR, MPC, MPPI, MultipleShooting, Sampling, Shooting, control, optimal, plans
from diffmbrl.policies import Affine, Gaussian, Linear, Neural, OpenLoop
from diffmbrl.rollout import episode_return, episode_returns, mean_return, rollout, rollouts
from diffmbrl.solve.loop import History, solve

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "CEM",
    "DDP",
    "ILQR",
    "MPC",
    "MPPI",
    "Affine",
    "BestSoFar",
    "Consensus",
    "Constraints",
    "Continuation",
    "GaussNewton",
    "Gaussian",
    "History",
    "Info",
    "KrylovNewton",
    "LikelihoodRatio",
    "Linear",
    "MultiStart",
    "MultipleShooting",
    "Neural",
    "NewtonCG",
    "OpenLoop",
    "OptaxSolver",
    "Sampling",
    "Sequential",
    "Shooting",
    "ShortHorizon",
    "Task",
    "Trajectory",
    "Truncated",
    "control",
    "episode_return",
    "episode_returns",
    "gradient_health",
    "mean_return",
    "optimal",
    "plans",
    "rollout",
    "rollouts",
    "solve",
    "tasks",
]
