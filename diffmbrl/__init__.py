"""Differentiable simulation in model-based reinforcement learning, first and second order side by side."""

# Before anything can compile: XLA reads its flags once.
# isort: off
from diffmbrl.xla import compile_small_loops_whole

compile_small_loops_whole()
# isort: on

from diffmbrl import tasks
from diffmbrl.constraints import Constraints, violation
from diffmbrl.core import Info, Task, Trajectory, Work
from diffmbrl.diagnostics.health import gradient_health
from diffmbrl.gradients import BPTT
from diffmbrl.nets import GRU, LSTM, MLP
from diffmbrl.optimizers import (
    Consensus,
    Continuation,
    Dense,
    Descend,
    Gate,
    GaussNewton,
    Krylov,
    KrylovNewton,
    LevenbergMarquardt,
    NaturalGradient,
    NewtonCG,
    Path,
    Preconditioned,
    Raced,
    Radii,
    Sampled,
    Sigma,
    SquareRoot,
    TrustRegion,
)
from diffmbrl.planners import (
    CEM,
    DDP,
    ILQR,
    MPC,
    MPPI,
    Boxed,
    Ending,
    MultipleShooting,
    Optimum,
    Plans,
    Predicted,
    Receding,
    Sampling,
    Shooting,
    Status,
    Unaware,
    act,
    control,
    expansion,
    implicit,
    optimal,
    plans,
)
from diffmbrl.policies import Affine, Gaussian, Linear, Neural, OpenLoop
from diffmbrl.rollout import expected, returns, rollout, rollouts, value, values
from diffmbrl.solve import History, iterate, solve

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "CEM",
    "DDP",
    "GRU",
    "ILQR",
    "LSTM",
    "MLP",
    "MPC",
    "MPPI",
    "Affine",
    "Boxed",
    "Consensus",
    "Constraints",
    "Continuation",
    "Dense",
    "Descend",
    "Ending",
    "Gate",
    "GaussNewton",
    "Gaussian",
    "History",
    "Info",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "Linear",
    "MultipleShooting",
    "NaturalGradient",
    "Neural",
    "NewtonCG",
    "OpenLoop",
    "Optimum",
    "Path",
    "Plans",
    "Preconditioned",
    "Predicted",
    "Raced",
    "Radii",
    "Receding",
    "Sampled",
    "Sampling",
    "Shooting",
    "Sigma",
    "SquareRoot",
    "Status",
    "Task",
    "Trajectory",
    "TrustRegion",
    "Unaware",
    "Work",
    "act",
    "control",
    "expansion",
    "expected",
    "gradient_health",
    "implicit",
    "iterate",
    "optimal",
    "plans",
    "returns",
    "rollout",
    "rollouts",
    "solve",
    "tasks",
    "value",
    "values",
    "violation",
]
