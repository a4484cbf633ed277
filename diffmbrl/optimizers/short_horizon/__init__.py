"""Windows of an episode with a learned critic behind them: SHAC and its kin."""

from diffmbrl.optimizers.short_horizon.cuts import AdaptiveHorizon, StiffCut
from diffmbrl.optimizers.short_horizon.exploration import Entropy, Noise
from diffmbrl.optimizers.short_horizon.solver import ShortHorizon

__all__ = ["AdaptiveHorizon", "Entropy", "Noise", "ShortHorizon", "StiffCut"]
