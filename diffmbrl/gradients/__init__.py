"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.bptt import BPTT
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
    "Clipped",
    "Critic",
    "Decayed",
    "Episode",
    "Fitted",
    "LeaveOneOut",
    "LikelihoodRatio",
    "Mean",
    "NoBaseline",
    "RewardToGo",
    "Smoothed",
    "Truncated",
]
