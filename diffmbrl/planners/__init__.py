"""Planners: solvers over plans, one start state at a time."""

from diffmbrl.planners.draw import Coloured, Even, Normal, TruncatedNormal
from diffmbrl.planners.ilqr import ILQR
from diffmbrl.planners.refit import CEM, MPPI, Best, EffectiveSize
from diffmbrl.planners.sampling import Sampling
from diffmbrl.planners.scoring import scores
from diffmbrl.planners.shooting import Projection, Shooting, Tanh

__all__ = [
    "CEM",
    "ILQR",
    "MPPI",
    "Best",
    "Coloured",
    "EffectiveSize",
    "Even",
    "Normal",
    "Projection",
    "Sampling",
    "Shooting",
    "Tanh",
    "TruncatedNormal",
    "scores",
]
