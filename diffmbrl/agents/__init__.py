"""Agents: loops that learn from a real system, with a model of it or without."""

from diffmbrl.agents.collect import Exact, RandomActions, System, Unknown
from diffmbrl.agents.idle import Idle
from diffmbrl.agents.learn import Agent, Learned, learn

__all__ = ["Agent", "Exact", "Idle", "Learned", "RandomActions", "System", "Unknown", "learn"]
