"""Planners: solvers over plans, one start state at a time."""

from diffmbrl.planners.ilqr import ILQR

__all__ = ["ILQR"]
