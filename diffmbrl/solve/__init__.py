"""The loop that runs a solver, its checks, and what it reports of values that are not finite."""

from diffmbrl.solve.looks import Looks, Unwatched
from diffmbrl.solve.loop import CHUNK, History, check, iterate, solve

__all__ = ["CHUNK", "History", "Looks", "Unwatched", "check", "iterate", "solve"]
