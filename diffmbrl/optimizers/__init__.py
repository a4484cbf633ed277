"""Optimisers of a policy's parameters."""

from diffmbrl.optimizers.consensus import Consensus
from diffmbrl.optimizers.damping import DampingGrid, LevenbergMarquardt, TrustRegion
from diffmbrl.optimizers.gauss_newton import GaussNewton
from diffmbrl.optimizers.newton import KrylovNewton
from diffmbrl.optimizers.newton_cg import NewtonCG
from diffmbrl.optimizers.optax_solver import OptaxSolver
from diffmbrl.optimizers.short_horizon import AdaptiveHorizon, Entropy, Noise, ShortHorizon, StiffCut
from diffmbrl.optimizers.systems import Dense, Krylov, Sigma, SquareRoot
from diffmbrl.optimizers.wrappers.best_so_far import BestSoFar
from diffmbrl.optimizers.wrappers.continuation import Continuation
from diffmbrl.optimizers.wrappers.minibatch import MiniBatch
from diffmbrl.optimizers.wrappers.multi_start import MultiStart
from diffmbrl.optimizers.wrappers.sequential import Sequential

__all__ = [
    "AdaptiveHorizon",
    "BestSoFar",
    "Consensus",
    "Continuation",
    "DampingGrid",
    "Dense",
    "Entropy",
    "GaussNewton",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "MiniBatch",
    "MultiStart",
    "NewtonCG",
    "Noise",
    "OptaxSolver",
    "Sequential",
    "ShortHorizon",
    "Sigma",
    "SquareRoot",
    "StiffCut",
    "TrustRegion",
]
