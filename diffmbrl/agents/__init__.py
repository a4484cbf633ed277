"""Agents: loops that learn from a real system, with a model of it or without."""

from diffmbrl.agents.actor import SquashedGaussian
from diffmbrl.agents.collect import Exact, NoisySensor, RandomActions, System, Unknown
from diffmbrl.agents.host import HostSystem
from diffmbrl.agents.idle import Idle
from diffmbrl.agents.imagine import imagine
from diffmbrl.agents.judged import Judged, judged, learnable
from diffmbrl.agents.learn import Agent, Learned, learn
from diffmbrl.agents.mbpo import MBPO, Growing
from diffmbrl.agents.model_free import OffPolicy, OnPolicy
from diffmbrl.agents.mpc_agent import MPCAgent
from diffmbrl.agents.ppo import PPO
from diffmbrl.agents.practice import Replayed, Streamed
from diffmbrl.agents.sac import SAC
from diffmbrl.agents.world import World

__all__ = [
    "MBPO",
    "PPO",
    "SAC",
    "Agent",
    "Exact",
    "Growing",
    "HostSystem",
    "Idle",
    "Judged",
    "Learned",
    "MPCAgent",
    "NoisySensor",
    "OffPolicy",
    "OnPolicy",
    "RandomActions",
    "Replayed",
    "SquashedGaussian",
    "Streamed",
    "System",
    "Unknown",
    "World",
    "imagine",
    "judged",
    "learn",
    "learnable",
]
