"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.alpha_order import AlphaOrder
from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.branches import branch
from diffmbrl.gradients.discontinuity import Agreement, DiscontinuityTested, Explained
from diffmbrl.gradients.inverse_variance import InverseVariance, InverseVariancePerStep
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
from diffmbrl.gradients.total_propagation import TotalPropagation
from diffmbrl.gradients.truncated import Clipped, Decayed, Truncated

__all__ = [
    "BPTT",
    "Agreement",
    "AlphaOrder",
    "Clipped",
    "Critic",
    "Decayed",
    "DiscontinuityTested",
    "Episode",
    "Explained",
    "Fitted",
    "InverseVariance",
    "InverseVariancePerStep",
    "LeaveOneOut",
    "LikelihoodRatio",
    "Mean",
    "NoBaseline",
    "RewardToGo",
    "Smoothed",
    "TotalPropagation",
    "Truncated",
    "branch",
]
