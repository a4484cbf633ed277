"""Planners: solvers over plans, one start state at a time."""

from diffmbrl.planners.ilqr import ILQR
from diffmbrl.planners.implicit import Optimum, implicit, optimal
from diffmbrl.planners.multiple_shooting import MultipleShooting

__all__ = ["ILQR", "MultipleShooting", "Optimum", "implicit", "optimal"]
