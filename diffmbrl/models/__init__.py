"""Learned dynamics, how they are trained, ensembles of dynamics, and the particles that go through them."""

from diffmbrl.models.ensemble import TS1, Ensemble, Mean, TSInfinity, disagreement, elites
from diffmbrl.models.fit import Curves, Training, train
from diffmbrl.models.gaussian import GaussianDynamics
from diffmbrl.models.mlp import NetworkDynamics
from diffmbrl.models.normalizer import Normalizer
from diffmbrl.models.particles import particles, replicate_start
from diffmbrl.models.recurrent import RecurrentDynamics, Remembered, remembering
from diffmbrl.models.reward import EndModel, RewardModel
from diffmbrl.models.simplex import SimplexMLP
from diffmbrl.models.spectral import bounded_spectrum

__all__ = [
    "TS1",
    "Curves",
    "EndModel",
    "Ensemble",
    "GaussianDynamics",
    "Mean",
    "NetworkDynamics",
    "Normalizer",
    "RecurrentDynamics",
    "Remembered",
    "RewardModel",
    "SimplexMLP",
    "TSInfinity",
    "Training",
    "bounded_spectrum",
    "disagreement",
    "elites",
    "particles",
    "remembering",
    "replicate_start",
    "train",
]
