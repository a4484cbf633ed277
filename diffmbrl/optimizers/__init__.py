"""Optimisers of a policy's parameters."""

from diffmbrl.optimizers.consensus import Consensus
from diffmbrl.optimizers.continuation import Continuation
from diffmbrl.optimizers.damping import LevenbergMarquardt, Path, TrustRegion
from diffmbrl.optimizers.descend import Descend
from diffmbrl.optimizers.gate import Gate
from diffmbrl.optimizers.gauss_newton import GaussNewton
from diffmbrl.optimizers.keep_best import KeepBest
from diffmbrl.optimizers.natural import NaturalGradient, Radii
from diffmbrl.optimizers.newton import KrylovNewton
from diffmbrl.optimizers.newton_cg import NewtonCG
from diffmbrl.optimizers.raced import Raced
from diffmbrl.optimizers.relay import Relay
from diffmbrl.optimizers.sampled import Sampled
from diffmbrl.optimizers.systems import Dense, Krylov, Preconditioned, Sigma, SquareRoot

__all__ = [
    "Consensus",
    "Continuation",
    "Dense",
    "Descend",
    "Gate",
    "GaussNewton",
    "KeepBest",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "NaturalGradient",
    "NewtonCG",
    "Path",
    "Preconditioned",
    "Raced",
    "Radii",
    "Relay",
    "Sampled",
    "Sigma",
    "SquareRoot",
    "TrustRegion",
]
