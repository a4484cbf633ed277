"""Solvers on windows of an episode with a learned critic at their end: SHAC, AHAC and SAPO."""

from diffmbrl.optimizers.short_horizon.cuts import AdaptiveHorizon, StiffCut
from diffmbrl.optimizers.short_horizon.exploration import Entropy, Noise
from diffmbrl.optimizers.short_horizon.solver import ShortHorizon

__all__ = ["AdaptiveHorizon", "Entropy", "Noise", "ShortHorizon", "StiffCut"]
