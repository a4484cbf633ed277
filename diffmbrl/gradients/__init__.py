"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.alpha_order import AlphaOrder
from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.branches import branch
from diffmbrl.gradients.decoupled import Decoupled, TrueForward
from diffmbrl.gradients.discontinuity import Agreement, DiscontinuityTested, Explained
from diffmbrl.gradients.evolution import CentredRanks, Evolution, Returns
from diffmbrl.gradients.exploration import Entropy, Noise
from diffmbrl.gradients.inverse_variance import InverseVariance, InverseVariancePerStep
from diffmbrl.gradients.likelihood_ratio import (
    Episode,
    Fitted,
    LearnedValue,
    LeaveOneOut,
    LikelihoodRatio,
    Mean,
    NoBaseline,
    RewardToGo,
)
from diffmbrl.gradients.reach import AdaptiveHorizon, StiffCut
from diffmbrl.gradients.short_horizon import ShortHorizon
from diffmbrl.gradients.smoothed import Smoothed
from diffmbrl.gradients.total_propagation import TotalPropagation
from diffmbrl.gradients.truncated import Clipped, Decayed, Truncated

__all__ = [
    "BPTT",
    "AdaptiveHorizon",
    "Agreement",
    "AlphaOrder",
    "CentredRanks",
    "Clipped",
    "Decayed",
    "Decoupled",
    "DiscontinuityTested",
    "Entropy",
    "Episode",
    "Evolution",
    "Explained",
    "Fitted",
    "InverseVariance",
    "InverseVariancePerStep",
    "LearnedValue",
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
    "TotalPropagation",
    "TrueForward",
    "Truncated",
    "branch",
]
