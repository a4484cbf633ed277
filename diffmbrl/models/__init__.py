"""Learned dynamics, how they are trained, ensembles of dynamics, and the particles that go through them."""

from diffmbrl.models.ensemble import TS1, Ensemble, Mean, TSInfinity
from diffmbrl.models.fit import Curves, Training, train
from diffmbrl.models.gaussian import GaussianDynamics
from diffmbrl.models.mlp import NetworkDynamics
from diffmbrl.models.normalizer import Normalizer
from diffmbrl.models.particles import particles, spread

__all__ = [
    "TS1",
    "Curves",
    "Ensemble",
    "GaussianDynamics",
    "Mean",
    "NetworkDynamics",
    "Normalizer",
    "TSInfinity",
    "Training",
    "particles",
    "spread",
    "train",
]
