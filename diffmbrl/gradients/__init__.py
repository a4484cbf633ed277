"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.decoupled import Decoupled, TrueForward
from diffmbrl.gradients.evolution import CentredRanks, Evolution, Returns
from diffmbrl.gradients.likelihood_ratio import (
    Critic,
    Episode,
    Fitted,
    LeaveOneOut,
    LikelihoodRatio,
    Mean,
    NoBaseline,
    RewardToGo,
)
from diffmbrl.gradients.smoothed import Smoothed
from diffmbrl.gradients.truncated import Clipped, Decayed, Truncated

__all__ = [
    "BPTT",
    "CentredRanks",
    "Clipped",
    "Critic",
    "Decayed",
    "Decoupled",
    "Episode",
    "Evolution",
    "Fitted",
    "LeaveOneOut",
    "LikelihoodRatio",
    "Mean",
    "NoBaseline",
    "Returns",
    "RewardToGo",
    "Smoothed",
    "TrueForward",
    "Truncated",
]
