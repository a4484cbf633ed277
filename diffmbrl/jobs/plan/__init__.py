"""Plan and control from start states."""

from diffmbrl.jobs.plan.run import FUNCTIONS, make_plan
from diffmbrl.jobs.plan.setting import FIRST, WINDOW, ResolvedPlan, resolve

__all__ = ["FIRST", "FUNCTIONS", "WINDOW", "ResolvedPlan", "make_plan", "resolve"]
