"""Agents that learn from a real system, with a learned model of it or without."""

from diffmbrl.agents.actor import SquashedGaussian
from diffmbrl.agents.collect import ExactSensor, NoisySensor, RandomActions, System, Unknown
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.host import HostSystem
from diffmbrl.agents.imagine import imagine
from diffmbrl.agents.learn import Learned, learn
from diffmbrl.agents.learned_reward import WithLearnedReward, learnable, with_learned_reward
from diffmbrl.agents.mbpo import MBPO, Growing
from diffmbrl.agents.model_free import OffPolicy, OnPolicy
from diffmbrl.agents.mpc_agent import MPCAgent
from diffmbrl.agents.ppo import PPO
from diffmbrl.agents.practice import OffPolicyPractice, OnPolicyPractice
from diffmbrl.agents.protocol import Agent
from diffmbrl.agents.random_agent import RandomAgent
from diffmbrl.agents.sac import SAC

__all__ = [
    "MBPO",
    "PPO",
    "SAC",
    "Agent",
    "EnsembleTrainer",
    "ExactSensor",
    "Growing",
    "HostSystem",
    "Learned",
    "MPCAgent",
    "NoisySensor",
    "OffPolicy",
    "OffPolicyPractice",
    "OnPolicy",
    "OnPolicyPractice",
    "RandomActions",
    "RandomAgent",
    "SquashedGaussian",
    "System",
    "Unknown",
    "WithLearnedReward",
    "imagine",
    "learn",
    "learnable",
    "with_learned_reward",
]
