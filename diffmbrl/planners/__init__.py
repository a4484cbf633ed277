"""Planners: solvers over plans, one start state at a time."""

from diffmbrl.planners.batch import OneByOne, Plans, Status, Together, plans
from diffmbrl.planners.draw import Coloured, Even, Normal, TruncatedNormal
from diffmbrl.planners.ilqr import DDP, ILQR
from diffmbrl.planners.implicit import Optimum, implicit, optimal
from diffmbrl.planners.models import Expansion, FirstOrder, SecondOrder, expansion
from diffmbrl.planners.multiple_shooting import MultipleShooting
from diffmbrl.planners.refit import CEM, MPPI, Best, EffectiveSize
from diffmbrl.planners.sampling import Sampling
from diffmbrl.planners.scoring import scores
from diffmbrl.planners.search import Backtracking, Parallel
from diffmbrl.planners.shooting import Projection, Shooting, Tanh
from diffmbrl.planners.sweeps import ActionDamped, Boxed, StateDamped

__all__ = [
    "CEM",
    "DDP",
    "ILQR",
    "MPPI",
    "ActionDamped",
    "Backtracking",
    "Best",
    "Boxed",
    "Coloured",
    "EffectiveSize",
    "Even",
    "Expansion",
    "FirstOrder",
    "MultipleShooting",
    "Normal",
    "OneByOne",
    "Optimum",
    "Parallel",
    "Plans",
    "Projection",
    "Sampling",
    "SecondOrder",
    "Shooting",
    "StateDamped",
    "Status",
    "Tanh",
    "Together",
    "TruncatedNormal",
    "expansion",
    "implicit",
    "optimal",
    "plans",
    "scores",
]
