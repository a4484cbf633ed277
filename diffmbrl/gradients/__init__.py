"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.exploration import Entropy, Noise
from diffmbrl.gradients.reach import AdaptiveHorizon, Truncation
from diffmbrl.gradients.short_horizon import ShortHorizon

__all__ = ["BPTT", "AdaptiveHorizon", "Entropy", "Noise", "ShortHorizon", "Truncation"]
