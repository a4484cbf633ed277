"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.decoupled import Decoupled, TrueForward
from diffmbrl.gradients.evolution import CentredRanks, Evolution, Returns
from diffmbrl.gradients.exploration import Entropy, Noise
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
from diffmbrl.gradients.reach import AdaptiveHorizon, StiffCut
from diffmbrl.gradients.short_horizon import ShortHorizon
from diffmbrl.gradients.smoothed import Smoothed
from diffmbrl.gradients.truncated import Clipped, Decayed, Truncated

__all__ = [
    "BPTT",
    "AdaptiveHorizon",
    "CentredRanks",
    "Clipped",
    "Critic",
    "Decayed",
    "Decoupled",
    "Entropy",
    "Episode",
    "Evolution",
    "Fitted",
    "LeaveOneOut",
    "LikelihoodRatio",
    "Mean",
    "NoBaseline",
    "Noise",
    "Returns",
    "RewardToGo",
    "ShortHorizon",
    "Smoothed",
    "StiffCut",
    "TrueForward",
    "Truncated",
]
