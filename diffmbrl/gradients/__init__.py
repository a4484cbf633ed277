"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.smoothed import Smoothed

__all__ = ["BPTT", "Smoothed"]
