"""Differentiable simulation in model-based reinforcement learning, first and second order side by side."""

# Before anything can compile: XLA reads its flags once.
# isort: off
from diffmbrl.xla import compile_small_loops_whole

compile_small_loops_whole()
# isort: on

from diffmbrl import tasks
from diffmbrl.constraints import Constraints, violation
from diffmbrl.core import Info, Task, Trajectory, Work
from diffmbrl.gradients import BPTT
from diffmbrl.nets import GRU, LSTM, MLP
from diffmbrl.optimizers import (
    Consensus,
    Continuation,
    Dense,
    Descend,
    GaussNewton,
    Krylov,
    KrylovNewton,
    LevenbergMarquardt,
    NaturalGradient,
    NewtonCG,
    Path,
    Preconditioned,
    Radii,
    Sampled,
    Sigma,
    SquareRoot,
    TrustRegion,
)
from diffmbrl.planners import CEM, ILQR, MPPI, Sampling, Shooting
from diffmbrl.policies import Affine, Gaussian, Linear, Neural, OpenLoop
from diffmbrl.rollout import expected, returns, rollout, rollouts, value, values
from diffmbrl.solve import History, iterate, solve

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "CEM",
    "GRU",
    "ILQR",
    "LSTM",
    "MLP",
    "MPPI",
    "Affine",
    "Consensus",
    "Constraints",
    "Continuation",
    "Dense",
    "Descend",
    "GaussNewton",
    "Gaussian",
    "History",
    "Info",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "Linear",
    "NaturalGradient",
    "Neural",
    "NewtonCG",
    "OpenLoop",
    "Path",
    "Preconditioned",
    "Radii",
    "Sampled",
    "Sampling",
    "Shooting",
    "Sigma",
    "SquareRoot",
    "Task",
    "Trajectory",
    "TrustRegion",
    "Work",
    "expected",
    "iterate",
    "returns",
    "rollout",
    "rollouts",
    "solve",
    "tasks",
    "value",
    "values",
    "violation",
]
