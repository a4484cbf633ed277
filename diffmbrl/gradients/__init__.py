"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.alpha_order import AlphaOrder
from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.branches import branch
from diffmbrl.gradients.decoupled import Decoupled, TrueForward
from diffmbrl.gradients.discontinuity import Agreement, DiscontinuityTested, Explained
from diffmbrl.gradients.evolution import CentredRanks, Evolution, Returns
from diffmbrl.gradients.inverse_variance import InverseVariance, InverseVariancePerStep
from diffmbrl.gradients.likelihood_ratio import (
    LeaveOneOut,
    LikelihoodRatio,
    LinearBaseline,
    MeanBaseline,
    NoBaseline,
    RewardToGo,
    TotalReturn,
    ValueBaseline,
)
from diffmbrl.gradients.smoothed import Smoothed
from diffmbrl.gradients.total_propagation import TotalPropagation
from diffmbrl.gradients.truncated import Clipped, Decayed, Truncated

__all__ = [
    "BPTT",
    "Agreement",
    "AlphaOrder",
    "CentredRanks",
    "Clipped",
    "Decayed",
    "Decoupled",
    "DiscontinuityTested",
    "Evolution",
    "Explained",
    "InverseVariance",
    "InverseVariancePerStep",
    "LeaveOneOut",
    "LikelihoodRatio",
    "LinearBaseline",
    "MeanBaseline",
    "NoBaseline",
    "Returns",
    "RewardToGo",
    "Smoothed",
    "TotalPropagation",
    "TotalReturn",
    "TrueForward",
    "Truncated",
    "ValueBaseline",
    "branch",
]
