"""Learned dynamics, ensembles of dynamics, and the particles that go through them."""

from diffmbrl.models.ensemble import TS1, Ensemble, Mean, TSInfinity
from diffmbrl.models.gaussian import GaussianDynamics
from diffmbrl.models.mlp import NetworkDynamics, Scales
from diffmbrl.models.particles import particles, spread

__all__ = [
    "TS1",
    "Ensemble",
    "GaussianDynamics",
    "Mean",
    "NetworkDynamics",
    "Scales",
    "TSInfinity",
    "particles",
    "spread",
]
