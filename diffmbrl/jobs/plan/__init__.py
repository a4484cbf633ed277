"""`diffmbrl plan`: planning and control from a few starts."""

from diffmbrl.jobs.plan.run import plan, resume
from diffmbrl.jobs.plan.setting import FIRST, WINDOW, PlanConfig, ResolvedPlan, prepare

__all__ = ["FIRST", "WINDOW", "PlanConfig", "ResolvedPlan", "plan", "prepare", "resume"]
