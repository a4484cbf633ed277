"""Planners: solvers over plans, one start state at a time."""

from diffmbrl.planners.batch import OneByOne, Plans, Status, Together, plans
from diffmbrl.planners.ilqr import DDP, ILQR
from diffmbrl.planners.models import Expansion, FirstOrder, SecondOrder, expansion
from diffmbrl.planners.search import Backtracking, Parallel
from diffmbrl.planners.sweeps import ActionDamped, Boxed, StateDamped

__all__ = [
    "DDP",
    "ILQR",
    "ActionDamped",
    "Backtracking",
    "Boxed",
    "Expansion",
    "FirstOrder",
    "OneByOne",
    "Parallel",
    "Plans",
    "SecondOrder",
    "StateDamped",
    "Status",
    "Together",
    "expansion",
    "plans",
]
