"""Optimisers of a policy's parameters."""

from diffmbrl.optimizers.consensus import Consensus
from diffmbrl.optimizers.damping import LevenbergMarquardt, Path, TrustRegion
from diffmbrl.optimizers.descend import Descend
from diffmbrl.optimizers.gate import Gate
from diffmbrl.optimizers.gauss_newton import GaussNewton
from diffmbrl.optimizers.natural import NaturalGradient, Radii
from diffmbrl.optimizers.newton import KrylovNewton
from diffmbrl.optimizers.newton_cg import NewtonCG
from diffmbrl.optimizers.short_horizon import AdaptiveHorizon, Entropy, Noise, ShortHorizon, StiffCut
from diffmbrl.optimizers.systems import Dense, Krylov, Preconditioned, Sigma, SquareRoot
from diffmbrl.optimizers.wrappers.best_so_far import KeepBest
from diffmbrl.optimizers.wrappers.continuation import Continuation
from diffmbrl.optimizers.wrappers.minibatch import Sampled
from diffmbrl.optimizers.wrappers.multi_start import Raced
from diffmbrl.optimizers.wrappers.sequential import Relay

__all__ = [
    "AdaptiveHorizon",
    "Consensus",
    "Continuation",
    "Dense",
    "Descend",
    "Entropy",
    "Gate",
    "GaussNewton",
    "KeepBest",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "NaturalGradient",
    "NewtonCG",
    "Noise",
    "Path",
    "Preconditioned",
    "Raced",
    "Radii",
    "Relay",
    "Sampled",
    "ShortHorizon",
    "Sigma",
    "SquareRoot",
    "StiffCut",
    "TrustRegion",
]
