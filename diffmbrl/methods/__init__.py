"""The named methods, from which `--method` and `--planner` choose."""

from diffmbrl.methods.row import CONTINUATIONS, Method, estimated, schedule, solver
from diffmbrl.methods.table import METHODS, method

__all__ = ["CONTINUATIONS", "METHODS", "Method", "estimated", "method", "schedule", "solver"]
