"""`diffmbrl plan`: planning and control from a few starts."""

from diffmbrl.jobs.plan.run import plan, resume
from diffmbrl.jobs.plan.setting import FIRST, WINDOW, Prepared, Setting, prepare

__all__ = ["FIRST", "WINDOW", "Prepared", "Setting", "plan", "prepare", "resume"]
