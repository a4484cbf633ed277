"""Estimators of the policy gradient dJ/dtheta."""

from diffmbrl.gradients.bptt import BPTT

__all__ = ["BPTT"]
