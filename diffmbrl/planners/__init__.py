"""Planners: solvers over plans, one start state at a time; and control with any of them in the loop."""

from diffmbrl.planners.ilqr import ILQR
from diffmbrl.planners.mpc import MPC, Predicted, Unaware, act, control
from diffmbrl.planners.windows import Ending, Receding

__all__ = ["ILQR", "MPC", "Ending", "Predicted", "Receding", "Unaware", "act", "control"]
