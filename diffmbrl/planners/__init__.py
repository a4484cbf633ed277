"""Planners: solvers over plans, one start state at a time; and control with any of them in the loop."""

from diffmbrl.planners.batch import OneByOne, Plans, Status, Together, plans
from diffmbrl.planners.distributions import Coloured, Normal, TruncatedNormal, Uniform
from diffmbrl.planners.ilqr import DDP, ILQR
from diffmbrl.planners.implicit import Optimum, implicit, optimal
from diffmbrl.planners.mpc import MPC, Predicted, Unaware, act, control
from diffmbrl.planners.multiple_shooting import MultipleShooting
from diffmbrl.planners.quadratic_models import Expansion, FirstOrder, SecondOrder, expansion
from diffmbrl.planners.refit import CEM, MPPI, ArgMax, EffectiveSize
from diffmbrl.planners.regularization import Damping
from diffmbrl.planners.riccati_sweeps import ActionDamped, BoxConstrained, StateDamped
from diffmbrl.planners.sampling import Sampling
from diffmbrl.planners.scoring import plan_returns
from diffmbrl.planners.search import Backtracking, Parallel
from diffmbrl.planners.shooting import Projection, Shooting, Tanh
from diffmbrl.planners.windows import Ending, Receding

__all__ = [
    "CEM",
    "DDP",
    "ILQR",
    "MPC",
    "MPPI",
    "ActionDamped",
    "ArgMax",
    "Backtracking",
    "BoxConstrained",
    "Coloured",
    "Damping",
    "EffectiveSize",
    "Ending",
    "Expansion",
    "FirstOrder",
    "MultipleShooting",
    "Normal",
    "OneByOne",
    "Optimum",
    "Parallel",
    "Plans",
    "Predicted",
    "Projection",
    "Receding",
    "Sampling",
    "SecondOrder",
    "Shooting",
    "StateDamped",
    "Status",
    "Tanh",
    "Together",
    "TruncatedNormal",
    "Unaware",
    "Uniform",
    "act",
    "control",
    "expansion",
    "implicit",
    "optimal",
    "plan_returns",
    "plans",
]
