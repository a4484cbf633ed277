"""The loop that runs a solver, its checks, and the search for the first value that is not finite."""

from diffmbrl.solve.checkpointer import Checkpointer, NoCheckpoints
from diffmbrl.solve.loop import CHUNK, History, check_problem, iterate, solve

__all__ = ["CHUNK", "Checkpointer", "History", "NoCheckpoints", "check_problem", "iterate", "solve"]
